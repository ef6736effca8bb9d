//! What packed weights, and keys and values in 16 bits beside them, do to logits.

mod support;

use candle_core::DType;
use kernels::testing::assert_close;
use models::Quantization;

/// With random weights, which enlarge every error, the recurrent layers' most of all, in sparse models no more than in
/// dense ones; logits that have nothing to do with each other are 1.4 apart. Pages alone change a hundredth (bf16) or a
/// thousandth (f16) of what Q4 does.
#[test]
fn logits_stay_near() {
    for (family, seed, q8, q4) in
        [("qwen3", 0, 0.07, 0.6), ("qwen3_5", 0, 0.15, 0.95), ("qwen3_5_moe", 4, 0.15, 0.95), ("gemma4", 0, 0.07, 0.6)]
    {
        let fixture = support::fixture(family, "base", seed);
        let ids = &support::reference(&fixture)["mid.ids"];
        let prompt: Vec<u32> = ids.to_dtype(DType::U32).and_then(|ids| ids.to_vec1()).expect("ids");
        let logits = |quantization, pages| support::logits(&fixture.join("f32"), &prompt, quantization, pages);
        let want = logits(None, DType::F32);
        for (pages, alone) in [(DType::F32, 0.0), (DType::F16, 0.001), (DType::BF16, 0.01)] {
            let packed = [(Some(Quantization::Q8), q8), (Some(Quantization::Q4), q4)];
            for (quantization, limit) in [(None, alone)].into_iter().chain(packed) {
                let name = format!("{family} {quantization:?}, pages in {pages:?}");
                assert_close(&name, &logits(quantization, pages), &want, limit);
            }
        }
    }
}
