//! Which blocks and state checkpoints already hold a prefix, and which to give up first.
//!
//! A tree of blocks: a node is a block of keys and values with the tokens it holds, its parent the block before
//! it. Only a full block has children. At any position inside a node a *checkpoint* may say which slot holds a
//! copy of the recurrent state there. A prompt walks the tree as far as its tokens agree and resumes at the last
//! position that has all it needs: for models with recurrent layers the last checkpoint on the way, for others
//! the end of the agreement. Both may lie inside a block, whose first rows are then copied.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use crate::blocks::{BlockPool, SlotPool};

/// Blocks and checkpoints by the tokens before them.
#[derive(Debug)]
pub struct PrefixCache {
    block_size: usize,
    /// Whether a prefix is of use only with a checkpoint of recurrent state.
    stateful: bool,
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
    parent: Option<usize>,
    children: Vec<usize>,
    checkpoints: Vec<Checkpoint>,
    /// Whether a checkpoint here was given up.
    evicted: bool,
    used: u64,
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
    /// The slot to copy the recurrent state from.
    pub slot: Option<u32>,
    /// Whether a later checkpoint inside the common prefix was given up.
    pub evicted: bool,
}

/// A prefix and where it lies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    pub tokens: Vec<u32>,
    /// The blocks that hold them, in order.
    pub blocks: Vec<u32>,
    /// Positions, the last one first, and the slots that hold the recurrent state there.
    pub states: Vec<(usize, u32)>,
}

impl PrefixCache {
    pub fn new(block_size: usize, stateful: bool) -> Self {
        Self { block_size, stateful, nodes: vec![], vacant: vec![], roots: vec![], clock: 0 }
    }

    /// Where a prompt of `tokens` resumes. At least its last token always runs, because its logits are wanted.
    pub fn find(&mut self, tokens: &[u32]) -> Resume {
        self.clock += 1;
        let (path, common) = self.walk(tokens);
        let limit = common.min(tokens.len().saturating_sub(1));
        let mut resume = Resume { common, ..Resume::default() };
        if self.stateful {
            resume.evicted = path.iter().any(|&index| self.node(index).evicted);
            let last = self.checkpoints(tokens).filter(|place| place.position <= limit).max_by_key(|it| it.position);
            if let Some(Place { position, node, checkpoint }) = last {
                let behind = position.div_ceil(self.block_size);
                resume.evicted = path.iter().skip(behind).any(|&index| self.node(index).evicted);
                resume.reused = position;
                let clock = self.clock;
                let node = self.node_mut(node);
                node.used = clock;
                node.checkpoints[checkpoint].used = clock;
                resume.slot = Some(node.checkpoints[checkpoint].slot);
            }
        } else {
            resume.reused = limit;
        }
        let full = resume.reused / self.block_size;
        resume.blocks = path[..full].iter().map(|&index| self.node(index).block).collect();
        if !resume.reused.is_multiple_of(self.block_size) {
            resume.partial = Some(self.node(path[full]).block);
        }
        for &index in &path[..resume.reused.div_ceil(self.block_size)] {
            self.node_mut(index).used = self.clock;
        }
        resume
    }

    /// Remembers that `blocks` hold `tokens`, and that `slot`, if given, holds the recurrent state after them. The
    /// cache becomes one more owner of each block that it did not know, and the owner of the slot.
    pub fn insert(
        &mut self,
        tokens: &[u32],
        blocks: &[u32],
        slot: Option<u32>,
        block_pool: &mut BlockPool,
        slot_pool: &mut SlotPool,
    ) {
        self.clock += 1;
        let mut parent = None;
        for (chunk, &block) in tokens.chunks(self.block_size).zip(blocks) {
            parent = Some(self.insert_chunk(parent, chunk, block, block_pool));
        }
        let Some(slot) = slot else { return };
        let Some(index) = parent else { return slot_pool.release(slot) };
        let len = tokens.len() - (tokens.len() - 1) / self.block_size * self.block_size;
        let used = self.clock;
        let node = self.node_mut(index);
        match node.checkpoints.iter_mut().find(|checkpoint| checkpoint.len == len) {
            Some(checkpoint) => {
                checkpoint.used = used;
                slot_pool.release(slot);
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
        states.sort_unstable_by_key(|(position, _)| Reverse(*position));
        states.truncate(CHECKPOINTS);
        let end = match (self.stateful, states.first()) {
            (false, _) => common,
            (true, Some((position, _))) => *position,
            (true, None) => 0,
        };
        let blocks = path[..end.div_ceil(self.block_size)].iter().map(|&index| self.node(index).block).collect();
        Prefix { tokens: tokens[..end].to_vec(), blocks, states }
    }

    /// Gives up the least recently used leaf whose block nobody else holds. Returns whether a block became free.
    pub fn evict_block(&mut self, block_pool: &mut BlockPool, slot_pool: &mut SlotPool) -> bool {
        let evictable = |node: &Node| node.children.is_empty() && block_pool.owners(node.block) == 1;
        let Some(index) = self.least_recent(|node| evictable(node).then_some(node.used)) else { return false };
        self.remove(index, block_pool, slot_pool);
        true
    }

    /// Gives up the least recently used checkpoint, and with it the blocks that no prompt can resume behind.
    /// Returns whether a slot became free.
    pub fn evict_checkpoint(&mut self, block_pool: &mut BlockPool, slot_pool: &mut SlotPool) -> bool {
        let oldest = |node: &Node| node.checkpoints.iter().map(|checkpoint| checkpoint.used).min();
        let Some(index) = self.least_recent(oldest) else { return false };
        let node = self.node_mut(index);
        let oldest = oldest(node).expect("the node was chosen for its checkpoint");
        let position = node.checkpoints.iter().position(|c| c.used == oldest).expect("just found");
        slot_pool.release(node.checkpoints.swap_remove(position).slot);
        node.evicted = true;
        let mut next = Some(index);
        while let Some(index) = next {
            let node = self.node(index);
            if !node.children.is_empty() || !node.checkpoints.is_empty() || block_pool.owners(node.block) > 1 {
                break;
            }
            next = node.parent;
            self.remove(index, block_pool, slot_pool);
        }
        true
    }

    /// Blocks that eviction could free, at most: a node that a sequence holds may pin ones before it.
    pub fn evictable_blocks(&self, block_pool: &BlockPool) -> usize {
        self.nodes.iter().flatten().filter(|node| block_pool.owners(node.block) == 1).count()
    }

    /// Blocks and checkpoints held.
    pub fn held(&self) -> (usize, usize) {
        let nodes = self.nodes.iter().flatten();
        nodes.fold((0, 0), |(blocks, checkpoints), node| (blocks + 1, checkpoints + node.checkpoints.len()))
    }

    /// Every block and every slot held.
    #[cfg(test)]
    pub fn holdings(&self) -> (Vec<u32>, Vec<u32>) {
        let nodes = || self.nodes.iter().flatten();
        let checkpoints = nodes().flat_map(|node| &node.checkpoints);
        (nodes().map(|node| node.block).collect(), checkpoints.map(|checkpoint| checkpoint.slot).collect())
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

    fn insert_chunk(&mut self, parent: Option<usize>, chunk: &[u32], block: u32, blocks: &mut BlockPool) -> usize {
        let used = self.clock;
        let siblings = parent.map_or(&self.roots, |parent| &self.node(parent).children);
        let alike = |&&index: &&usize| {
            let tokens = &self.node(index).tokens;
            let shorter = tokens.len().min(chunk.len());
            tokens[..shorter] == chunk[..shorter]
        };
        if let Some(&index) = siblings.iter().find(alike) {
            let node = self.node_mut(index);
            node.used = used;
            if node.tokens.len() < chunk.len() {
                node.tokens = chunk.to_vec();
                if node.block != block {
                    blocks.share(block);
                    blocks.release(std::mem::replace(&mut node.block, block));
                }
            }
            return index;
        }
        blocks.share(block);
        let node =
            Node { tokens: chunk.to_vec(), block, parent, children: vec![], checkpoints: vec![], evicted: false, used };
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

    fn remove(&mut self, index: usize, block_pool: &mut BlockPool, slot_pool: &mut SlotPool) {
        let node = self.nodes[index].take().expect("only live nodes are linked");
        self.vacant.push(index);
        block_pool.release(node.block);
        node.checkpoints.iter().for_each(|checkpoint| slot_pool.release(checkpoint.slot));
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
