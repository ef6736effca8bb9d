//! Many threads and tasks on one model: each reply is the one that its request gets alone, whoever shares the engine,
//! cancels or does not read.
#![cfg(feature = "demo")]

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use futures_core::Stream;
use kernels::testing::Random;
use taper::{Error, Llm, Message, Options, SamplingParams, Service, ServiceOptions};

fn service(max_requests: usize) -> Service {
    Llm::demo(&Options::default()).expect("the demo is built in").serve(&ServiceOptions { max_requests })
}

fn params(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.8, seed: Some(seed), max_tokens: 24, ..SamplingParams::default() }
}

const COUNTRIES: [&str; 6] = ["France", "Spain", "Italy", "Norway", "Japan", "Egypt"];

fn question(index: usize) -> [Message; 1] {
    [Message::user(format!("What is the capital of {}?", COUNTRIES[index % COUNTRIES.len()]))]
}

/// What each of `count` requests gets when nothing else runs.
fn alone(count: usize) -> Vec<String> {
    let service = service(1);
    let reply = |index: usize| service.reply(&question(index), &[], None, &params(index as u64));
    (0..count).map(|index| reply(index).expect("room").finish().expect("a reply").content).collect()
}

/// Waits until the engine has nothing left to do.
fn settle(service: &Service) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let stats = service.stats();
        if stats.running + stats.waiting == 0 {
            assert_eq!(stats.free_blocks + stats.cached_blocks, stats.num_blocks, "{stats:?}");
            return;
        }
        assert!(Instant::now() < deadline, "{stats:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Threads that ask, half of them cancelling at random. `TAPER_SOAK_MINUTES` makes it run for so long, and watch the
/// memory of the process.
#[test]
fn concurrent_requests_get_the_replies_that_they_get_alone() {
    const THREADS: usize = 64;
    let minutes: f64 = std::env::var("TAPER_SOAK_MINUTES").map_or(0.0, |text| text.parse().expect("a number"));
    let deadline = Instant::now() + Duration::from_secs_f64(60.0 * minutes);
    let want = alone(48);
    let service = service(THREADS);
    let resident = |when: &str| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default().to_string();
        println!("{when}: {line}, {:?}", service.stats());
    };
    let served: usize = thread::scope(|scope| {
        let ask = |thread: usize| {
            let (service, want) = (&service, &want);
            scope.spawn(move || {
                let (mut random, mut served) = (Random::new(thread as u64), 0);
                while served < 4 || Instant::now() < deadline {
                    let index = random.below(want.len());
                    let mut stream = match service.reply(&question(index), &[], None, &params(index as u64)) {
                        // The engine learns of a dropped stream in its own time.
                        Err(Error::Busy { .. }) => {
                            thread::sleep(Duration::from_millis(1));
                            continue;
                        }
                        stream => stream.expect("a valid request"),
                    };
                    if random.below(3) == 0 {
                        stream.by_ref().take(random.below(6)).for_each(|piece| drop(piece.expect("a piece")));
                        continue;
                    }
                    assert_eq!(stream.finish().expect("a reply").content, want[index], "request {index}");
                    served += 1;
                }
                served
            })
        };
        let threads: Vec<_> = (0..THREADS).map(ask).collect();
        while minutes > 0.0 && Instant::now() < deadline {
            resident("soak");
            thread::sleep(Duration::from_secs(30));
        }
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    settle(&service);
    resident("end");
    println!("{served} replies");
}

#[test]
fn too_many_requests_are_refused() {
    let service = service(2);
    let endless = SamplingParams { ignore_eos: true, max_tokens: 400, ..params(0) };
    let mut streams: Vec<_> =
        (0..2).map(|index| service.reply(&question(index), &[], None, &endless).expect("room")).collect();
    streams[0].next().expect("a piece").expect("a piece");
    let refused = service.reply(&question(2), &[], None, &endless).map(drop).expect_err("there is no room");
    assert!(matches!(refused, Error::Busy { waiting: 2 }), "{refused}");
    drop(streams);
    settle(&service);
    service.reply(&question(2), &[], None, &params(2)).expect("room again").finish().expect("a reply");
}

#[test]
fn what_is_wrong_with_a_request_is_its_streams_first_item() {
    let service = service(8);
    let long = "word ".repeat(100_000);
    let mut stream = service.generate(&long, &params(0)).expect("room");
    let error = stream.next().expect("an item").expect_err("too long").to_string();
    assert!(error.starts_with("the prompt has "), "{error}");
    assert!(stream.next().is_none());
    let error = service.generate("", &params(0)).expect("room").finish().expect_err("empty").to_string();
    assert_eq!(error, "the prompt is empty");
    let reply = service.reply(&question(0), &[], None, &SamplingParams::default()).expect("room").finish();
    assert_eq!(reply.expect("a reply").content, "The capital of France is Paris.");
}

#[test]
fn a_stream_outlives_its_service() {
    let service = service(8);
    let stream = service.reply(&question(1), &[], None, &SamplingParams::default()).expect("room");
    drop(service);
    assert_eq!(stream.finish().expect("a reply").content, "The capital of Spain is Madrid.");
}

/// Runs a future on this thread: no runtime is needed.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[test]
fn a_task_reads_two_replies_at_once() {
    let service = service(8);
    let greedy = SamplingParams::default();
    let mut streams = [0, 1].map(|index| service.reply(&question(index), &[], None, &greedy).expect("room"));
    let mut open = [true; 2];
    block_on(poll_fn(|context| {
        for (stream, open) in streams.iter_mut().zip(&mut open).filter(|(_, open)| **open) {
            while let Poll::Ready(piece) = Pin::new(&mut *stream).poll_next(context) {
                match piece {
                    Some(piece) => drop(piece.expect("a piece")),
                    None => {
                        *open = false;
                        break;
                    }
                }
            }
        }
        if open == [false; 2] { Poll::Ready(()) } else { Poll::Pending }
    }));
    let replies = streams.each_ref().map(|stream| stream.reply().content.as_str());
    assert_eq!(replies, ["The capital of France is Paris.", "The capital of Spain is Madrid."]);
}
