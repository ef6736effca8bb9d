//! What an encoder makes of a text, and how two such are compared.

/// What an encoder makes of a text. A head that was not asked for is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embedding {
    /// One vector for the text.
    pub dense: Vec<f32>,
    /// Token ids with their weights, ascending by id; weights are positive.
    pub sparse: Vec<(u32, f32)>,
    /// A vector for each token after the first.
    pub colbert: Vectors,
    /// Tokens that ran, special ones included.
    pub tokens: usize,
    /// Tokens that were cut off because the text is longer than the limit; zero for a whole text.
    pub truncated: usize,
}

/// Vectors of one size, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vectors {
    /// Elements of a vector.
    pub size: usize,
    pub values: Vec<f32>,
}

impl Vectors {
    /// A single vector.
    pub(crate) fn one(values: Vec<f32>) -> Self {
        Self { size: values.len(), values }
    }

    /// The vectors in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.size.max(1))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len() / self.size.max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// The inner product of two vectors: their cosine, if both are normalised. Zero if they differ in size.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    if a.len() != b.len() {
        return 0.0;
    }
    let (a, b) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.0.iter().zip(b.0) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a.1.iter().zip(b.1).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// The sum over the ids that both have of the products of their weights. Both ascend by id.
pub fn lexical(a: &[(u32, f32)], b: &[(u32, f32)]) -> f32 {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut sum = 0.0;
    while let (Some((left, weight)), Some((right, other))) = (a.peek(), b.peek()) {
        if left == right {
            sum += weight * other;
        }
        let (left, right) = (*left, *right);
        a.next_if(|(id, _)| *id <= right);
        b.next_if(|(id, _)| *id <= left);
    }
    sum
}

/// How well a passage answers each vector of a query, on average: the mean over the query's vectors of the largest inner
/// product with one of the passage's. Zero if either has none.
///
/// Source: Khattab and Zaharia, "ColBERT", 2020, with the mean of bge-m3 for the sum.
pub fn late_interaction(query: &Vectors, passage: &Vectors) -> f32 {
    if query.is_empty() || passage.is_empty() || query.size != passage.size {
        return 0.0;
    }
    let best = |q: &[f32]| passage.iter().map(|p| dot(q, p)).fold(f32::NEG_INFINITY, f32::max);
    query.iter().map(best).sum::<f32>() / query.len() as f32
}

/// How much each head counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    pub dense: f32,
    pub sparse: f32,
    pub colbert: f32,
}

impl Default for Weights {
    /// Those that bge-m3's paper recommends.
    fn default() -> Self {
        Self { dense: 1.0, sparse: 0.3, colbert: 1.0 }
    }
}

/// A passage's scores for a query.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores {
    pub dense: f32,
    pub sparse: f32,
    pub colbert: f32,
    /// The weighted mean of the three, over the weights' sum.
    pub hybrid: f32,
}

/// Compares a query with a passage by every head that counts.
pub fn score(query: &Embedding, passage: &Embedding, weights: Weights) -> Scores {
    let of = |weight: f32, score: &dyn Fn() -> f32| if weight != 0.0 { score() } else { 0.0 };
    let dense = of(weights.dense, &|| dot(&query.dense, &passage.dense));
    let sparse = of(weights.sparse, &|| lexical(&query.sparse, &passage.sparse));
    let colbert = of(weights.colbert, &|| late_interaction(&query.colbert, &passage.colbert));
    let sum = weights.dense + weights.sparse + weights.colbert;
    let hybrid = (weights.dense * dense + weights.sparse * sparse + weights.colbert * colbert) / sum;
    Scores { dense, sparse, colbert, hybrid: if sum == 0.0 { 0.0 } else { hybrid } }
}

/// The `k` best of `scores` with their indices, best first; equals keep their order. NaN is the worst.
pub fn top_k(scores: impl IntoIterator<Item = f32>, k: usize) -> Vec<(usize, f32)> {
    let key = |score: f32| if score.is_nan() { f32::NEG_INFINITY } else { score };
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(k.saturating_add(1).min(1 << 16));
    for (index, score) in scores.into_iter().enumerate() {
        let place = best.partition_point(|(_, other)| key(*other) >= key(score));
        if place < k {
            best.insert(place, (index, score));
            best.truncate(k);
        }
    }
    best
}

/// Scales `vector` to length one; one of length zero stays.
pub(crate) fn normalize(vector: &mut [f32]) {
    let length = dot(vector, vector).sqrt().max(1e-12);
    vector.iter_mut().for_each(|value| *value /= length);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_by_hand() {
        assert_eq!(dot(&[1.0, 2.0, 3.0], &[4.0, -5.0, 6.0]), 12.0);
        let ramp: Vec<f32> = (0..100).map(|i| i as f32).collect();
        assert_eq!(dot(&ramp, &ramp), 328_350.0);
        assert_eq!(lexical(&[(1, 0.5), (4, 2.0), (9, 1.0)], &[(4, 3.0), (5, 7.0), (9, 0.25)]), 6.25);
        assert_eq!(lexical(&[], &[(4, 3.0)]), 0.0);
        let query = Vectors { size: 2, values: vec![1.0, 0.0, 0.0, 1.0] };
        let passage = Vectors { size: 2, values: vec![0.5, 0.0, 0.25, -1.0, 0.125, 0.0] };
        assert_eq!(late_interaction(&query, &passage), 0.25);
        assert_eq!(late_interaction(&query, &Vectors::default()), 0.0);
    }

    #[test]
    fn a_hybrid_is_the_weighted_mean() {
        let of =
            |dense: f32, sparse: f32| Embedding { dense: vec![dense], sparse: vec![(7, sparse)], ..Default::default() };
        let got = score(&of(1.0, 2.0), &of(0.5, 0.25), Weights { dense: 1.0, sparse: 3.0, colbert: 0.0 });
        assert_eq!(got, Scores { dense: 0.5, sparse: 0.5, colbert: 0.0, hybrid: 0.5 });
        assert_eq!(score(&of(1.0, 2.0), &of(0.5, 0.25), Weights { dense: 0.0, sparse: 0.0, colbert: 0.0 }).hybrid, 0.0);
    }

    #[test]
    fn the_best_come_first() {
        let scores = [0.1, f32::NAN, 0.9, 0.5, 0.9, -1.0];
        assert_eq!(top_k(scores, 3), [(2, 0.9), (4, 0.9), (3, 0.5)]);
        assert_eq!(top_k(scores, 0), []);
        assert_eq!(top_k(scores, 10).len(), 6);
        assert_eq!(top_k([f32::NAN, 1.0], 1), [(1, 1.0)]);
    }
}
