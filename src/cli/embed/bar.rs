//! How far it is: texts and tokens per second, and the time left where the size of the input is known.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::parts::Progress;

/// A line on stderr. Nothing is drawn if that is not a terminal.
pub struct Bar {
    bar: ProgressBar,
    read: Arc<AtomicU64>,
    started: Instant,
    resumed: Progress,
}

impl Bar {
    /// Over `bytes` of input, if known, of which `read` are read.
    pub fn new(bytes: Option<u64>, read: Arc<AtomicU64>) -> Self {
        let bar = match bytes {
            Some(0) => ProgressBar::hidden(),
            Some(bytes) => ProgressBar::new(bytes),
            None => ProgressBar::new_spinner(),
        };
        let template = if bytes.is_some() { "{bar:24} {percent:>3}% {msg} · {eta} left" } else { "{spinner} {msg}" };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, read, started: Instant::now(), resumed: Progress::default() }
    }

    /// Goes on from what an earlier run did, which does not count for rates.
    pub fn resume(&mut self, progress: &Progress) {
        self.resumed = progress.clone();
        self.started = Instant::now();
        self.bar.set_position(self.read.load(Ordering::Relaxed));
        self.bar.reset_eta();
        if progress.read > 0 {
            self.say(&format!("taper: goes on after {} rows of an earlier run", progress.read));
        }
    }

    pub fn show(&self, progress: &Progress) {
        self.bar.set_position(self.read.load(Ordering::Relaxed));
        self.bar.set_message(self.rates(progress));
    }

    /// A line of its own.
    pub fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    pub fn finish(&self, progress: &Progress) {
        let is_drawn = !self.bar.is_hidden();
        self.bar.finish_and_clear();
        if is_drawn {
            eprintln!("{}", self.rates(progress));
        }
    }

    fn rates(&self, progress: &Progress) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let texts = (progress.written - self.resumed.written) as f64 / seconds;
        let tokens = (progress.tokens - self.resumed.tokens) as f64 / seconds;
        format!("{} texts · {texts:.0} texts/s · {tokens:.0} tok/s", progress.written)
    }
}
