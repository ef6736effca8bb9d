//! One request as the scheduler sees it: token ids, how many of them are in the cache, and where.

/// Names a request within its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(crate) u64);

/// A request's tokens and what the cache holds of them.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: SequenceId,
    /// The prompt and what was generated.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Leading tokens of the prompt that a later prompt is likely to share: a checkpoint stands there.
    pub stable_len: usize,
    /// Leading tokens whose keys, values and state are in the cache.
    pub computed: usize,
    pub blocks: Vec<u32>,
    /// As `blocks`, for layers with a window: `NO_BLOCK` where the window has passed. Empty if there are none.
    pub window_blocks: Vec<u32>,
    /// `None` while the sequence waits.
    pub slot: Option<u32>,
    /// Set when the sequence first runs.
    pub reuse: Option<Reuse>,
}

impl Sequence {
    pub fn new(id: SequenceId, prompt: Vec<u32>, stable_len: usize) -> Self {
        let prompt_len = prompt.len();
        Self {
            id,
            tokens: prompt,
            prompt_len,
            stable_len,
            computed: 0,
            blocks: vec![],
            window_blocks: vec![],
            slot: None,
            reuse: None,
        }
    }

    /// Tokens that must run before the next one can be sampled.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }
}

/// How much of a prompt came from the cache, and why not more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reuse {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Leading tokens that the cache knew.
    pub common: usize,
    /// Leading tokens that did not run again. Models with recurrent layers resume at a checkpoint of their state.
    pub reused: usize,
    /// Why fewer tokens were reused than the cache knew. `None` if all were, the last token of the prompt aside.
    pub shortfall: Option<Shortfall>,
}

/// Why a known prefix could not be reused to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortfall {
    /// No checkpoint of the recurrent state stands between the point of resumption and the end of the prefix.
    NoCheckpoint,
    /// There was one, and it was given up for lack of memory.
    Evicted,
    /// Layers with a window no longer hold the tokens before a later point: a sequence gives them up as it goes on, but
    /// for those before its checkpoints.
    WindowPassed,
}

impl std::fmt::Display for Shortfall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoCheckpoint => "no checkpoint of the recurrent state further on",
            Self::Evicted => "a later checkpoint was given up for lack of memory",
            Self::WindowPassed => "the sliding layers no longer hold the tokens before a later point",
        })
    }
}
