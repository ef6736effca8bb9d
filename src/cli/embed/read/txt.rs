//! Plain text: every line is a text, an empty one too, so that line `n` is row `n`.

use super::super::super::Result;
use super::{Content, Item, Lines, utf8};

pub fn rows(mut lines: Lines) -> impl Iterator<Item = Result<Item>> {
    std::iter::from_fn(move || {
        let line = lines.next().transpose()?;
        Some(line.map(|(place, bytes)| Item { place, content: utf8(bytes).map(|text| Content { id: None, text }) }))
    })
}
