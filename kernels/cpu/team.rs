//! The threads of a step.
//!
//! A step is hundreds of ops of a few microseconds to a few hundred, too short to wake a thread for each. So the other
//! threads of the pool join a step once, at its start, and look for work until it ends. An op is a range of indices in
//! equal parts, one for each thread, which takes the indices of its own in their order and then those that are left of
//! the others'. So a thread reads on where it was, one that the system holds back does less, and nothing depends on who
//! did what.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, AtomicUsize};

use rayon::prelude::*;

use self::ahead::{Ahead, SharedStretch, Stretch};
use self::manners::{Manners, processor};

mod ahead;
mod manners;

/// Runs `f` on one of the pool's threads, with the others at hand for [`share`].
pub fn lead<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let team = &Team::new(rayon::current_num_threads());
    rayon::scope(|scope| {
        let this = rayon::current_thread_index();
        let gather = || {
            scope.spawn_broadcast(move |_, thread| {
                if Some(thread.index()) != this {
                    team.help(thread.index())
                }
            })
        };
        let leader = Leader { team, thread: this.unwrap_or(0), gather: Cell::new(Some(&gather)) };
        let _over = OnDrop(|| team.epoch.0.store(OVER, Release));
        let _role = match rayon::current_num_threads() {
            1 => Role::Worker.take(),
            _ => Role::Leader((&raw const leader).cast()).take(),
        };
        f()
    })
}

/// Runs `f` with every index below `count`, in any order: on the threads of this thread's step, or outside of a step on
/// those of the pool. Within `f` it is a loop.
pub fn share(count: usize, f: impl Fn(usize) + Sync) {
    match ROLE.get() {
        _ if count <= 1 => (0..count).for_each(f),
        Role::None => (0..count).into_par_iter().for_each(&f),
        Role::Worker => (0..count).for_each(f),
        // SAFETY: the thread has the role for as long as `lead` has the leader.
        Role::Leader(leader) => unsafe { &*leader }.run(Job { f: &f, count }),
    }
}

/// As [`share`], with `range` in pieces of `len`.
pub fn share_pieces(range: Range<usize>, len: usize, f: impl Fn(Range<usize>) + Sync) {
    share(range.len().div_ceil(len), |i| {
        let start = range.start + i * len;
        f(start..range.end.min(start + len))
    })
}

/// Says that what is shared next goes through `weights` from end to end, each thread through its part of them. A step
/// then finds the weights of the next such op on their way.
pub fn reads<T>(weights: &[T]) {
    if let Role::Leader(leader) = ROLE.get() {
        // SAFETY: as in [`share`].
        unsafe { &*leader }.team.next.0.set(ahead::read(Stretch::from(weights)));
    }
}

/// What this thread is to a step.
#[derive(Clone, Copy)]
enum Role {
    None,
    Leader(*const Leader<'static>),
    /// Within `f` of a [`share`].
    Worker,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::None) };
}

impl Role {
    /// Until what it returns is dropped.
    fn take(self) -> OnDrop<impl FnMut()> {
        let before = ROLE.replace(self);
        OnDrop(move || ROLE.set(before))
    }
}

struct Leader<'a> {
    team: &'a Team,
    /// Its own index in the pool.
    thread: usize,
    /// Brings the other threads, if they are not on their way.
    gather: Cell<Option<&'a dyn Fn()>>,
}

impl Leader<'_> {
    fn run(&self, job: Job) {
        if let Some(gather) = self.gather.take() {
            gather()
        }
        self.team.run(job, self.thread)
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)()
    }
}

/// Alone on its cache lines, which are fetched in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

#[derive(Clone, Copy)]
struct Job<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    count: usize,
}

struct Team {
    /// Odd while there is a job, another number for each; or [`OVER`].
    epoch: Line<AtomicUsize>,
    /// How much of each thread's part of a job is taken, below the lower half of the job's epoch. Under any other epoch,
    /// nothing is.
    taken: Box<[Line<AtomicU64>]>,
    /// Helpers that may be at the job.
    busy: Line<AtomicUsize>,
    /// Where the leader is.
    leader: Line<AtomicUsize>,
    /// What will be read after the weights that are read now, as far as is known.
    next: Line<SharedStretch>,
    /// Written by the leader while the epoch is even and nobody is busy, read by helpers that are busy in an odd one.
    job: UnsafeCell<Option<Job<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The step has ended.
const OVER: usize = usize::MAX - 1;

// SAFETY: `job` is never written while another thread may read it, see there; what it refers to is `Sync`.
unsafe impl Sync for Team {}

impl Team {
    fn new(threads: usize) -> Self {
        Self {
            epoch: Line::default(),
            taken: (0..threads).map(|_| Line::default()).collect(),
            busy: Line::default(),
            leader: Line::default(),
            next: Line::default(),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
        }
    }

    fn run(&self, job: Job, thread: usize) {
        // SAFETY: the epoch is even and nobody is busy. The references end before this function does: it returns or
        // unwinds only when the epoch is even again and nobody busy.
        unsafe { *self.job.get() = Some(std::mem::transmute::<Job<'_>, Job<'static>>(job)) };
        self.leader.0.store(processor(), Relaxed);
        let epoch = self.epoch.0.fetch_add(1, SeqCst) + 1;
        {
            let _close = OnDrop(|| {
                self.epoch.0.fetch_add(1, SeqCst);
                let mut patience = Patience::default();
                while self.busy.0.load(SeqCst) > 0 {
                    patience.wait();
                }
            });
            self.work(job, epoch, thread, || false);
        }
        if let Some(panic) = self.panic.lock().expect("nothing panics that holds it").take() {
            resume_unwind(panic)
        }
    }

    /// Takes what is left of the job, that of `thread` first, until it is `enough`.
    fn work(&self, Job { f, count }: Job, epoch: usize, thread: usize, enough: impl Fn() -> bool) {
        let _role = Role::Worker.take();
        let parts = self.taken.len();
        for part in (thread..parts).chain(0..thread) {
            let indices = count * part / parts..count * (part + 1) / parts;
            while !enough() {
                match self.take(part, epoch, indices.len()) {
                    Some(index) => f(indices.start + index),
                    None => break,
                }
            }
        }
    }

    /// The first of `len` indices of a part that nobody took.
    fn take(&self, part: usize, epoch: usize, len: usize) -> Option<usize> {
        if len == 0 {
            return None;
        }
        let (line, epoch) = (&self.taken[part].0, epoch as u64 & u64::from(u32::MAX));
        let mut seen = line.load(Relaxed);
        loop {
            let taken = if seen >> 32 == epoch { seen as u32 } else { 0 };
            if taken as usize >= len {
                return None;
            }
            match line.compare_exchange_weak(seen, epoch << 32 | u64::from(taken + 1), Relaxed, Relaxed) {
                Ok(_) => return Some(taken as usize),
                Err(now) => seen = now,
            }
        }
    }

    fn help(&self, thread: usize) {
        let mut seen = 0;
        let (mut manners, mut patience, mut ahead) = (Manners::new(), Patience::default(), Ahead::default());
        loop {
            match self.epoch.0.load(Acquire) {
                OVER => break,
                epoch if epoch % 2 == 1 && epoch != seen => {
                    self.join(epoch, thread, &manners);
                    (seen, patience) = (epoch, Patience::default());
                }
                _ if ahead.ask(self.next.0.get(), thread, self.taken.len()) => {}
                // Ops that are not ours share their work among the pool's threads in its own way.
                _ if patience.wait() => _ = rayon::yield_now(),
                _ => {}
            }
            if manners.rest(self.leader.0.load(Relaxed)) {
                seen = 0;
            }
        }
    }

    fn join(&self, epoch: usize, thread: usize, manners: &Manners) {
        self.busy.0.fetch_add(1, SeqCst);
        // Whoever is busy before the leader closed the epoch is waited for.
        if self.epoch.0.load(SeqCst) == epoch {
            // SAFETY: see the field.
            let job = unsafe { *self.job.get() }.expect("the leader wrote it before it opened the epoch");
            let work = || self.work(job, epoch, thread, || manners.ask_for_rest());
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                // Nobody needs the rest.
                for part in 0..self.taken.len() {
                    while self.take(part, epoch, job.count).is_some() {}
                }
                self.panic.lock().expect("nothing panics that holds it").get_or_insert(panic);
            }
        }
        self.busy.0.fetch_sub(1, SeqCst);
    }
}

/// How a thread waits: awake at first, then letting others have its processor, who may be those that it waits for.
#[derive(Default)]
struct Patience {
    turns: usize,
}

impl Patience {
    /// Waits for a moment; returns whether some moments have passed since it last did.
    fn wait(&mut self) -> bool {
        const SOME: usize = 32;
        /// About 100 microseconds.
        const AWAKE: usize = 2000;
        spin_loop();
        self.turns += 1;
        let some = self.turns.is_multiple_of(SOME);
        if some && self.turns > AWAKE {
            std::thread::yield_now();
        }
        some
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn on<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads").install(f)
    }

    #[test]
    fn every_index_runs_once() {
        let check = |count: usize| {
            let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            share(count, |i| {
                share(3, |_| {
                    runs[i].fetch_add(1, Relaxed);
                })
            });
            assert!(runs.iter().all(|runs| runs.load(Relaxed) == 3), "{count}");
        };
        for threads in [1, 2, 3, 8] {
            on(threads, || lead(|| (0..40).chain([1000]).for_each(check)));
            on(threads, || check(100));
        }
    }

    /// Neither of two pieces of work ends before the other has begun, and each thread takes its own.
    #[test]
    fn two_threads_are_at_work() {
        on(2, || {
            lead(|| {
                for _ in 0..100 {
                    let both = Barrier::new(2);
                    share(2, |i| {
                        both.wait();
                        assert_eq!(rayon::current_thread_index(), Some(i));
                    });
                    rayon::join(|| both.wait(), || both.wait());
                }
            })
        });
    }

    #[test]
    fn helpers_know_what_is_read_next() {
        on(2, || {
            let weights = [vec![0u8; 64], vec![0; 128]];
            lead(|| {
                for _ in 0..2 {
                    weights.iter().for_each(|weights| reads(weights));
                }
                let Role::Leader(leader) = ROLE.get() else { panic!("two threads") };
                // SAFETY: as in `share`.
                let next = unsafe { &*leader }.team.next.0.get();
                assert_eq!(next, Stretch::from(&weights[0][..]));
            })
        })
    }

    #[test]
    fn a_panic_comes_back_from_wherever_it_was() {
        for bad in [0, 1, 50, 99] {
            let both = Barrier::new(2);
            let result = catch_unwind(AssertUnwindSafe(|| {
                on(2, || {
                    lead(|| {
                        share(100, |i| {
                            // The first of either's part.
                            if i % 50 == 0 {
                                both.wait();
                            }
                            assert!(i != bad);
                        })
                    })
                })
            }));
            assert!(result.is_err(), "{bad}");
        }
    }
}
