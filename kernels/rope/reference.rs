//! The definition of the rotation, in place on f32 rows.

/// `x` `[N, heads, d]`; `cos`, `sin` `[N, half]`.
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32], heads: usize, d: usize, half: usize) {
    for (token, rows) in x.chunks_exact_mut(heads * d).enumerate() {
        let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
        for head in rows.chunks_exact_mut(d) {
            let (first, rest) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], rest[i]);
                first[i] = a * cos[i] - b * sin[i];
                rest[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}
