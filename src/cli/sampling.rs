//! The options of sampling, each overriding the model's own default.

use taper::SamplingParams;

#[derive(Clone, Debug, Default, clap::Args)]
pub struct SamplingArgs {
    /// End the reply after this many tokens
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    max_tokens: Option<usize>,
    /// 0 always takes the likeliest token; higher is more varied
    #[arg(long, value_name = "T", help_heading = "Sampling")]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens only
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that make up this probability
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    top_p: Option<f32>,
    /// Drop tokens less likely than this times the likeliest
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    min_p: Option<f32>,
    /// Make tokens that were used before less likely; 1 is off
    #[arg(long, value_name = "X", help_heading = "Sampling")]
    repetition_penalty: Option<f32>,
    /// Lower every used token's logit by this
    #[arg(long, value_name = "X", help_heading = "Sampling")]
    presence_penalty: Option<f32>,
    /// Same seed, same reply
    #[arg(long, value_name = "SEED", help_heading = "Sampling")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The model's defaults with the options given on top.
    pub fn over(&self, defaults: &SamplingParams) -> SamplingParams {
        SamplingParams {
            max_tokens: self.max_tokens.unwrap_or(defaults.max_tokens),
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            seed: self.seed.or(defaults.seed),
            ..defaults.clone()
        }
    }
}
