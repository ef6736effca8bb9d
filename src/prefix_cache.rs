//! Which blocks and state checkpoints already hold a prefix, and which to give up first.
//!
//! A tree of blocks: a node is a block of keys and values with the tokens it holds, its parent the block before
//! it. Only a full block has children. At any position inside a node a *checkpoint* may say which slot holds a
//! copy of the recurrent state there. A prompt walks the tree as far as its tokens agree and resumes at the last
//! position that has all it needs: for models with recurrent layers the last checkpoint on the way, for others
//! the end of the agreement. Both may lie inside a block, whose first rows are then copied.
//!
//! For layers with a window a node holds a second block, which sequences give up as their window passes: it is there
//! for the last tokens of whatever was inserted. A position has what it needs only if the nodes of the window before it
//! still hold theirs.

use std::cmp::Reverse;

use kernels::NO_BLOCK;
use serde::{Deserialize, Serialize};

use crate::blocks::Pools;

/// Blocks and checkpoints by the tokens before them.
#[derive(Debug)]
pub struct PrefixCache {
    block_size: usize,
    /// Whether a prefix is of use only with a checkpoint of recurrent state.
    stateful: bool,
    /// Tokens of the window, if there are layers with one.
    window: Option<usize>,
    nodes: Vec<Option<Node>>,
    vacant: Vec<usize>,
    roots: Vec<usize>,
    clock: u64,
}

#[derive(Debug)]
struct Node {
    /// At most `block_size`; fewer only in a leaf.
    tokens: Vec<u32>,
    block: u32,
    window_block: Option<WindowBlock>,
    parent: Option<usize>,
    children: Vec<usize>,
    checkpoints: Vec<Checkpoint>,
    /// Whether a checkpoint here was given up.
    evicted: bool,
    used: u64,
}

/// A node's block in the layers with a window, of which the first `rows` rows hold the node's tokens.
#[derive(Clone, Copy, Debug)]
struct WindowBlock {
    block: u32,
    rows: usize,
}

/// A copy of the recurrent state after the node's first `len` tokens.
#[derive(Debug)]
struct Checkpoint {
    len: usize,
    slot: u32,
    used: u64,
}

/// Where a checkpoint stands.
struct Place {
    /// Tokens before it.
    position: usize,
    node: usize,
    /// Which one of the node's.
    checkpoint: usize,
}

/// Where a prompt can resume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resume {
    /// Leading tokens that are in the cache.
    pub common: usize,
    /// Leading tokens that need not run again.
    pub reused: usize,
    /// Full blocks to share, in order.
    pub blocks: Vec<u32>,
    /// The block whose first `reused % block_size` rows must be copied to a fresh one.
    pub partial: Option<u32>,
    /// As `blocks`, for layers with a window: `NO_BLOCK` before the window.
    pub window_blocks: Vec<u32>,
    /// As `partial`, for layers with a window.
    pub window_partial: Option<u32>,
    /// The slot to copy the recurrent state from.
    pub slot: Option<u32>,
    /// Whether a later checkpoint inside the common prefix was given up.
    pub evicted: bool,
    /// Whether a later position was passed over because its window is gone.
    pub window_passed: bool,
}

/// The blocks of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    pub blocks: &'a [u32],
    /// Of layers with a window, `NO_BLOCK` where there is none; empty if there are no such layers.
    pub window_blocks: &'a [u32],
}

/// A prefix and where it lies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    pub tokens: Vec<u32>,
    /// The blocks that hold them, in order.
    pub blocks: Vec<u32>,
    /// Those of layers with a window, `NO_BLOCK` where there is none; empty if there are no such layers.
    pub window_blocks: Vec<u32>,
    /// Positions, the last one first, and the slots that hold the recurrent state there.
    pub states: Vec<(usize, u32)>,
}

impl PrefixCache {
    pub fn new(block_size: usize, stateful: bool, window: Option<usize>) -> Self {
        Self { block_size, stateful, window, nodes: vec![], vacant: vec![], roots: vec![], clock: 0 }
    }

    /// Where a prompt of `tokens` resumes. At least its last token always runs, because its logits are wanted.
    pub fn find(&mut self, tokens: &[u32]) -> Resume {
        self.clock += 1;
        let (path, common) = self.walk(tokens);
        let limit = common.min(tokens.len().saturating_sub(1));
        let mut resume = Resume { common, ..Resume::default() };
        if self.stateful {
            let mut places: Vec<Place> = self.checkpoints(tokens).filter(|place| place.position <= limit).collect();
            places.sort_unstable_by_key(|place| place.position);
            let held = places.iter().rposition(|place| self.held_before(&path, place.position) == place.position);
            resume.window_passed = held.map_or(0, |index| index + 1) < places.len();
            if let Some(Place { position, node, checkpoint }) = held.map(|index| places.swap_remove(index)) {
                let clock = self.clock;
                let node = self.node_mut(node);
                (node.used, node.checkpoints[checkpoint].used) = (clock, clock);
                (resume.reused, resume.slot) = (position, Some(node.checkpoints[checkpoint].slot));
            }
            let later = &path[resume.reused.div_ceil(self.block_size)..];
            resume.evicted = later.iter().any(|&index| self.node(index).evicted);
        } else {
            resume.reused = self.held_before(&path, limit);
            resume.window_passed = resume.reused < limit;
        }
        let full = resume.reused / self.block_size;
        let partial = (!resume.reused.is_multiple_of(self.block_size)).then(|| self.node(path[full]));
        resume.blocks = path[..full].iter().map(|&index| self.node(index).block).collect();
        resume.partial = partial.map(|node| node.block);
        if self.window.is_some() {
            let first = self.first_in_window(resume.reused);
            let block = |node: &Node| node.window_block.map_or(NO_BLOCK, |window_block| window_block.block);
            resume.window_blocks = vec![NO_BLOCK; first];
            resume.window_blocks.extend(path[first..full].iter().map(|&index| block(self.node(index))));
            resume.window_partial = partial.map(block);
        }
        let clock = self.clock;
        for &index in &path[..resume.reused.div_ceil(self.block_size)] {
            self.node_mut(index).used = clock;
        }
        resume
    }

    /// Remembers that `held` holds `tokens`, and that `slot`, if given, holds the recurrent state after them. The cache
    /// becomes one more owner of each block that it did not know, and the owner of the slot.
    pub fn insert(&mut self, tokens: &[u32], held: Blocks, slot: Option<u32>, pools: &mut Pools) {
        self.clock += 1;
        let mut parent = None;
        let window_blocks = held.window_blocks.iter().map(|&block| Some(block).filter(|&block| block != NO_BLOCK));
        let blocks = held.blocks.iter().zip(window_blocks.chain(std::iter::repeat(None)));
        for (chunk, (&block, window_block)) in tokens.chunks(self.block_size).zip(blocks) {
            parent = Some(self.insert_chunk(parent, chunk, block, window_block, pools));
        }
        let Some(slot) = slot else { return };
        let Some(index) = parent else { return pools.slots.release(slot) };
        let len = tokens.len() - (tokens.len() - 1) / self.block_size * self.block_size;
        let used = self.clock;
        let node = self.node_mut(index);
        match node.checkpoints.iter_mut().find(|checkpoint| checkpoint.len == len) {
            Some(checkpoint) => {
                checkpoint.used = used;
                pools.slots.release(slot);
            }
            None => node.checkpoints.push(Checkpoint { len, slot, used }),
        }
    }

    /// Whether the state after exactly these tokens has a checkpoint.
    pub fn has_checkpoint(&self, tokens: &[u32]) -> bool {
        self.checkpoints(tokens).any(|place| place.position == tokens.len())
    }

    /// What is held of `tokens`, as far as a prompt that begins with them could resume. Of the checkpoints on the way
    /// the last two count: in a conversation one stands behind the last reply and one before it.
    pub fn resumable(&self, tokens: &[u32]) -> Prefix {
        const CHECKPOINTS: usize = 2;
        let (path, common) = self.walk(tokens);
        let slot = |place: &Place| self.node(place.node).checkpoints[place.checkpoint].slot;
        let mut states: Vec<(usize, u32)> = self.checkpoints(tokens).map(|it| (it.position, slot(&it))).collect();
        states.retain(|(position, _)| self.held_before(&path, *position) == *position);
        states.sort_unstable_by_key(|(position, _)| Reverse(*position));
        states.truncate(CHECKPOINTS);
        let end = match (self.stateful, states.first()) {
            (false, _) => self.held_before(&path, common),
            (true, Some((position, _))) => *position,
            (true, None) => 0,
        };
        let nodes = || path[..end.div_ceil(self.block_size)].iter().map(|&index| self.node(index));
        let mut window_blocks = vec![];
        if self.window.is_some() {
            let starts = (0..).step_by(self.block_size);
            let whole = |(start, node): (usize, &Node)| {
                let window_block = node.window_block.filter(|it| it.rows >= (end - start).min(self.block_size));
                window_block.map_or(NO_BLOCK, |it| it.block)
            };
            window_blocks = starts.zip(nodes()).map(whole).collect();
        }
        let blocks = nodes().map(|node| node.block).collect();
        Prefix { tokens: tokens[..end].to_vec(), blocks, window_blocks, states }
    }

    /// Gives up the least recently used leaf whose block nobody else holds. Returns whether a block became free.
    pub fn evict_block(&mut self, pools: &mut Pools) -> bool {
        let evictable = |node: &Node| node.children.is_empty() && pools.blocks.owners(node.block) == 1;
        let Some(index) = self.least_recent(|node| evictable(node).then_some(node.used)) else { return false };
        self.remove(index, pools);
        true
    }

    /// Gives up the least recently used window block that nobody else holds. Returns whether one became free.
    pub fn evict_window_block(&mut self, pools: &mut Pools) -> bool {
        let evictable = |node: &Node| (pools.window_blocks.owners(node.window_block?.block) == 1).then_some(node.used);
        let Some(index) = self.least_recent(evictable) else { return false };
        let given_up = self.node_mut(index).window_block.take().expect("the node was chosen for it");
        pools.window_blocks.release(given_up.block);
        true
    }

    /// Gives up the least recently used checkpoint, and with it the blocks that no prompt can resume behind.
    /// Returns whether a slot became free.
    pub fn evict_checkpoint(&mut self, pools: &mut Pools) -> bool {
        let oldest = |node: &Node| node.checkpoints.iter().map(|checkpoint| checkpoint.used).min();
        let Some(index) = self.least_recent(oldest) else { return false };
        let node = self.node_mut(index);
        let oldest = oldest(node).expect("the node was chosen for its checkpoint");
        let position = node.checkpoints.iter().position(|c| c.used == oldest).expect("just found");
        pools.slots.release(node.checkpoints.swap_remove(position).slot);
        node.evicted = true;
        let mut next = Some(index);
        while let Some(index) = next {
            let node = self.node(index);
            if !node.children.is_empty() || !node.checkpoints.is_empty() || pools.blocks.owners(node.block) > 1 {
                break;
            }
            next = node.parent;
            self.remove(index, pools);
        }
        true
    }

    /// Blocks that eviction could free, at most: a node that a sequence holds may pin ones before it.
    pub fn evictable_blocks(&self, pools: &Pools) -> usize {
        self.nodes.iter().flatten().filter(|node| pools.blocks.owners(node.block) == 1).count()
    }

    /// Blocks and checkpoints held.
    pub fn held(&self) -> (usize, usize) {
        let nodes = self.nodes.iter().flatten();
        nodes.fold((0, 0), |(blocks, checkpoints), node| (blocks + 1, checkpoints + node.checkpoints.len()))
    }

    /// Every block, window block and slot held.
    #[cfg(test)]
    pub fn holdings(&self) -> [Vec<u32>; 3] {
        let nodes = || self.nodes.iter().flatten();
        let window_blocks = nodes().filter_map(|node| Some(node.window_block?.block));
        let checkpoints = nodes().flat_map(|node| &node.checkpoints);
        [nodes().map(|node| node.block).collect(), window_blocks.collect(), checkpoints.map(|c| c.slot).collect()]
    }

    /// The last position up to `limit` before which the path holds a whole window.
    fn held_before(&self, path: &[usize], limit: usize) -> usize {
        let mut position = limit;
        loop {
            let lacking =
                (self.first_in_window(position)..position.div_ceil(self.block_size)).rev().find_map(|depth| {
                    let start = depth * self.block_size;
                    let rows = self.node(path[depth]).window_block.map_or(0, |window_block| window_block.rows);
                    (rows < (position - start).min(self.block_size)).then_some(start + rows)
                });
            match lacking {
                Some(end) if self.window.is_some() => position = end,
                _ => return position,
            }
        }
    }

    /// The block that the window of the token at `position` begins in.
    fn first_in_window(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window) / self.block_size)
    }

    /// The nodes along `tokens`, the last perhaps in part, and how many tokens agree.
    fn walk(&self, tokens: &[u32]) -> (Vec<usize>, usize) {
        let (mut path, mut common) = (vec![], 0);
        while common == path.len() * self.block_size && common < tokens.len() {
            let siblings = path.last().map_or(&self.roots, |&last| &self.node(last).children);
            let agreements = siblings.iter().map(|&index| (index, self.agreement(index, &tokens[common..])));
            match agreements.max_by_key(|(_, len)| *len) {
                Some((best, len)) if len > 0 => {
                    path.push(best);
                    common += len;
                }
                _ => break,
            }
        }
        (path, common)
    }

    /// Every checkpoint inside of `tokens`. It may stand beside the nodes along them: in one that agrees up to the
    /// checkpoint and then goes on otherwise.
    fn checkpoints(&self, tokens: &[u32]) -> impl Iterator<Item = Place> {
        let (path, common) = self.walk(tokens);
        let levels = (0..path.len()).take_while(move |depth| depth * self.block_size < common);
        levels.flat_map(move |depth| {
            let start = depth * self.block_size;
            let siblings = depth.checked_sub(1).map_or(&self.roots, |parent| &self.node(path[parent]).children);
            siblings.iter().flat_map(move |&node| {
                let len = self.agreement(node, &tokens[start..]);
                let inside = self.node(node).checkpoints.iter().enumerate().filter(move |(_, it)| it.len <= len);
                inside.map(move |(checkpoint, it)| Place { position: start + it.len, node, checkpoint })
            })
        })
    }

    /// How many tokens a node and `rest` have in common.
    fn agreement(&self, node: usize, rest: &[u32]) -> usize {
        self.node(node).tokens.iter().zip(rest).take_while(|(cached, token)| cached == token).count()
    }

    fn insert_chunk(
        &mut self,
        parent: Option<usize>,
        chunk: &[u32],
        block: u32,
        window_block: Option<u32>,
        pools: &mut Pools,
    ) -> usize {
        let used = self.clock;
        if let Some(block) = window_block {
            self.forget_window_block(parent, chunk, block, pools);
        }
        let siblings = parent.map_or(&self.roots, |parent| &self.node(parent).children);
        let alike = |&&index: &&usize| self.agreement(index, chunk) == self.node(index).tokens.len().min(chunk.len());
        // Part of a block may be alike to several: to the one that holds the block first, or it would be held twice.
        let preference = |&&index: &&usize| {
            let node = self.node(index);
            let holds = node.block == block || node.window_block.is_some_and(|known| Some(known.block) == window_block);
            (holds, node.tokens.len().min(chunk.len()))
        };
        if let Some(&index) = siblings.iter().filter(alike).max_by_key(preference) {
            let node = self.node_mut(index);
            node.used = used;
            if node.tokens.len() < chunk.len() {
                node.tokens = chunk.to_vec();
                if node.block != block {
                    pools.blocks.share(block);
                    pools.blocks.release(std::mem::replace(&mut node.block, block));
                }
            }
            if let Some(block) = window_block
                && node.window_block.is_none_or(|known| known.rows < chunk.len())
            {
                pools.window_blocks.share(block);
                let known = node.window_block.replace(WindowBlock { block, rows: chunk.len() });
                known.into_iter().for_each(|known| pools.window_blocks.release(known.block));
            }
            return index;
        }
        pools.blocks.share(block);
        let window_block = window_block.map(|block| {
            pools.window_blocks.share(block);
            WindowBlock { block, rows: chunk.len() }
        });
        let node = Node {
            tokens: chunk.to_vec(),
            block,
            window_block,
            parent,
            children: vec![],
            checkpoints: vec![],
            evicted: false,
            used,
        };
        let index = match self.vacant.pop() {
            Some(index) => {
                self.nodes[index] = Some(node);
                index
            }
            None => {
                self.nodes.push(Some(node));
                self.nodes.len() - 1
            }
        };
        self.siblings_mut(parent).push(index);
        index
    }

    /// Takes a window block from a sibling that knows it as its own: a sequence has gone on in it otherwise than the
    /// sibling. In two nodes it could not be given up.
    fn forget_window_block(&mut self, parent: Option<usize>, chunk: &[u32], block: u32, pools: &mut Pools) {
        for index in self.siblings_mut(parent).clone() {
            let node = self.node_mut(index);
            let is_other = !node.tokens.starts_with(chunk) && !chunk.starts_with(&node.tokens);
            if is_other && node.window_block.take_if(|known| known.block == block).is_some() {
                pools.window_blocks.release(block);
            }
        }
    }

    fn remove(&mut self, index: usize, pools: &mut Pools) {
        let node = self.nodes[index].take().expect("only live nodes are linked");
        self.vacant.push(index);
        pools.blocks.release(node.block);
        node.window_block.into_iter().for_each(|window_block| pools.window_blocks.release(window_block.block));
        node.checkpoints.iter().for_each(|checkpoint| pools.slots.release(checkpoint.slot));
        if let (Some(parent), true) = (node.parent, node.evicted || !node.checkpoints.is_empty()) {
            self.node_mut(parent).evicted = true;
        }
        self.siblings_mut(node.parent).retain(|&sibling| sibling != index);
    }

    fn least_recent(&self, used: impl Fn(&Node) -> Option<u64>) -> Option<usize> {
        let nodes = self.nodes.iter().enumerate();
        let candidates = nodes.filter_map(|(index, node)| Some((used(node.as_ref()?)?, index)));
        candidates.min().map(|(_, index)| index)
    }

    fn siblings_mut(&mut self, parent: Option<usize>) -> &mut Vec<usize> {
        match parent {
            Some(parent) => &mut self.node_mut(parent).children,
            None => &mut self.roots,
        }
    }

    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("only live nodes are linked")
    }

    fn node_mut(&mut self, index: usize) -> &mut Node {
        self.nodes[index].as_mut().expect("only live nodes are linked")
    }
}
