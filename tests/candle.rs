//! Our Qwen3 beside the one in candle-transformers, on the same weights and prompt.

mod support;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::qwen3::{Config as CandleConfig, ModelForCausalLM};
use kernels::testing::{Random, assert_close};
use kernels::{Batch, Segment};
use models::{Cache, CacheConfig, Checkpoint, Config};

#[test]
fn qwen3_gives_candles_logits() {
    for variant in ["base", "untied", "mqa"] {
        let folder = support::fixture("qwen3", variant, 0).join("f32");
        let tokens: Vec<u32> = {
            let mut random = Random::new(9);
            (0..70).map(|_| random.below(400) as u32).collect()
        };

        let checkpoint = Checkpoint::Folder(folder.clone());
        let model = Config::read(&checkpoint)
            .and_then(|config| config.load(&checkpoint, DType::F32, &Device::Cpu))
            .expect("a fixture");
        let config = CacheConfig {
            num_blocks: 5,
            num_window_blocks: 0,
            block_size: 16,
            num_slots: 1,
            dtype: DType::F32,
            device: Device::Cpu,
        };
        let mut cache = Cache::new(&model.cache_specs(), config).expect("memory");
        let segment = Segment { tokens: &tokens, past: 0, blocks: &[3, 0, 4, 1, 2], slot: 0 };
        let batch = Batch::new(&[segment], 16, &Device::Cpu).expect("a batch");
        let hidden = model.forward(&batch, &mut cache).expect("a step");
        let ours = model.logits(&hidden.narrow(0, 69, 1).expect("the last row")).expect("logits");

        let config = std::fs::read(folder.join("config.json")).expect("a fixture");
        let config: CandleConfig = serde_json::from_slice(&config).expect("candle reads the same file");
        let tensors = support::tensors(&folder.join("model.safetensors"));
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let mut candle = ModelForCausalLM::new(&config, weights).expect("the same tensors");
        let input = Tensor::new(tokens.as_slice(), &Device::Cpu).and_then(|tokens| tokens.unsqueeze(0)).expect("a row");
        let theirs = candle.forward(&input, 0).expect("logits");

        let values = |tensor: &Tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).expect("f32");
        assert_close(variant, &values(&ours), &values(&theirs), 1e-5);
    }
}
