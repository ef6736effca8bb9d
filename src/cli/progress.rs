//! Download progress on stderr.

use indicatif::{ProgressBar, ProgressStyle};
use taper::hub::Progress;

/// One bar at a time: file, bytes, rate, time left. Nothing is drawn if stderr is not a terminal.
#[derive(Default)]
pub struct Bars {
    bar: Option<ProgressBar>,
}

impl Progress for Bars {
    fn begin(&mut self, file: &str, total_bytes: u64, resumed_at: u64) {
        let style = ProgressStyle::with_template(
            "{msg:32!} {bar:24} {bytes:>10} of {total_bytes:<10} {bytes_per_sec:>12} {eta:>4} left",
        );
        let bar = ProgressBar::new(total_bytes);
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_message(file.to_string());
        bar.set_position(resumed_at);
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}
