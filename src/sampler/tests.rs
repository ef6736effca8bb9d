use std::collections::HashSet;
use std::fs;

use proptest::prelude::*;

use super::*;

const LOGITS: [f32; 12] = [2.0, -1.0, 0.5, 3.25, 1.5, -2.5, 2.75, 0.0, 1.0, -0.5, 3.0, 0.25];

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params, &[], usize::MAX).unwrap()
}

fn hot(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: Some(seed), ..Default::default() }
}

/// The tokens that `params` leaves of `logits`, with their probabilities.
fn distribution(params: SamplingParams, prompt: &[u32], logits: &[f32]) -> Vec<(u32, f64)> {
    let sampler = Sampler::new(params, prompt, usize::MAX).unwrap();
    let logits = sampler.penalised(logits);
    let candidates = sampler.candidates(&logits, checked_max(&logits).unwrap());
    let total = mass(&candidates);
    candidates.into_iter().map(|(token, weight)| (token, f64::from(weight) / total)).collect()
}

/// `distribution` by definition: sort everything, then apply one filter after the other.
fn defined(params: &SamplingParams, logits: &[f32]) -> Vec<(u32, f64)> {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    let mut kept: Vec<(u32, f64)> = (0..)
        .zip(logits)
        .filter(|&(_, &logit)| logit > f32::NEG_INFINITY)
        .map(|(token, logit)| (token, f64::from(((logit - max) / params.temperature).exp())))
        .collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    kept.truncate(params.top_k.unwrap_or(usize::MAX));
    let sum = |kept: &[(u32, f64)]| kept.iter().map(|&(_, weight)| weight).sum::<f64>();
    let wanted = f64::from(params.top_p) * sum(&kept);
    let mut better = 0.0;
    kept.retain(|&(_, weight)| {
        better += weight;
        better - weight < wanted
    });
    kept.retain(|&(_, weight)| weight >= f64::from(params.min_p));
    kept.sort_by_key(|&(token, _)| token);
    let total = sum(&kept);
    kept.into_iter().map(|(token, weight)| (token, weight / total)).collect()
}

/// Asserts that `counts` of independent draws fit `expected` probabilities: Pearson's statistic stays below its 99.9 %
/// point (Wilson and Hilferty's approximation). The draws are seeded, so the outcome is always the same.
fn assert_fits(name: &str, counts: &[usize], expected: &[f64]) {
    let draws: usize = counts.iter().sum();
    let (mut statistic, mut cells) = (0.0, 0);
    for (token, (&count, &probability)) in counts.iter().zip(expected).enumerate() {
        if probability == 0.0 {
            assert_eq!(count, 0, "{name}: token {token} has no probability");
            continue;
        }
        let expected = probability * draws as f64;
        assert!(expected >= 5.0, "{name}: too few draws for token {token}");
        statistic += (count as f64 - expected).powi(2) / expected;
        cells += 1;
    }
    let freedom = f64::from(cells - 1);
    let limit = freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.09 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    assert!(statistic < limit, "{name}: chi-square {statistic:.1}, expected below {limit:.1}");
}

/// Kept tokens and their probabilities as the processors and warpers of transformers 5.23 (torch 2.15) leave them,
/// applied to `LOGITS` in the order of its `generate`, after the tokens 3, 1, 3, 7, 0.
#[test]
fn agrees_with_transformers() {
    let plain = SamplingParams { temperature: 1.0, ..Default::default() };
    let every = SamplingParams { temperature: 1.25, top_k: Some(7), top_p: 0.75, min_p: 0.25, ..plain };
    type Case<'a> = (SamplingParams, &'a [u32], &'a [f64]);
    let cases: &[Case] = &[
        (
            SamplingParams { temperature: 0.5, ..plain },
            &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
            &[
                0.038965, 0.000097, 0.00194, 0.47469, 0.014334, 0.000005, 0.174629, 0.000714, 0.005273, 0.000263,
                0.287914, 0.001177,
            ],
        ),
        (SamplingParams { top_k: Some(4), ..plain }, &[0, 3, 6, 10], &[0.107231, 0.374274, 0.227009, 0.291485]),
        (SamplingParams { top_p: 0.75, ..plain }, &[3, 6, 10], &[0.419229, 0.254275, 0.326496]),
        (SamplingParams { top_p: 0.01, ..plain }, &[3], &[1.0]),
        (SamplingParams { min_p: 0.2, ..plain }, &[0, 3, 6, 10], &[0.107231, 0.374274, 0.227009, 0.291485]),
        (
            SamplingParams { repetition_penalty: 1.5, ..plain },
            &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
            &[
                0.062918, 0.003701, 0.027344, 0.144773, 0.074329, 0.001361, 0.259433, 0.016585, 0.045083, 0.010059,
                0.333119, 0.021296,
            ],
        ),
        (
            SamplingParams { temperature: 0.6, top_k: Some(20), top_p: 0.95, ..plain },
            &[0, 3, 6, 10],
            &[0.056129, 0.450785, 0.19591, 0.297176],
        ),
        (
            SamplingParams { repetition_penalty: 1.5, ..every },
            &[3, 4, 6, 10],
            &[0.194968, 0.114377, 0.310909, 0.379746],
        ),
        (
            SamplingParams { temperature: 0.6, top_p: 0.95, min_p: 0.05, repetition_penalty: 1.5, ..every },
            &[0, 3, 4, 6, 10],
            &[0.030288, 0.121466, 0.039986, 0.321134, 0.487127],
        ),
    ];
    for (params, tokens, probabilities) in cases {
        let got = distribution(params.clone(), &[3, 1, 3, 7, 0], &LOGITS);
        assert_eq!(got.iter().map(|&(token, _)| token).collect::<Vec<_>>(), *tokens, "{params:?}");
        for (&(token, got), want) in got.iter().zip(*probabilities) {
            assert!((got - want).abs() < 2e-6, "{params:?}: token {token} has {got}, expected {want}");
        }
    }
}

/// Multiples of 1/4 so that ties are common; with weights this close to each other their f64 sums are exact, and no
/// order of summation can move the edge of the nucleus.
fn tied_logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![9 => (-16i8..=16).prop_map(|x| f32::from(x) / 4.0), 1 => Just(f32::NEG_INFINITY)];
    prop::collection::vec(logit, 1..300).prop_filter("one finite logit", |all| all.iter().any(|l| l.is_finite()))
}

proptest! {
    #[test]
    fn filters_match_their_definition(
        logits in tied_logits(),
        temperature in prop::sample::select(vec![1.0f32, 1.5, 3.0]),
        top_k in prop::option::of(1usize..40),
        top_p in prop_oneof![Just(1.0f32), Just(0.5), 0.001f32..1.0],
        min_p in prop_oneof![Just(0.0f32), Just(1.0), 0.0f32..1.0],
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, ..Default::default() };
        let mut got = distribution(params.clone(), &[], &logits);
        got.retain(|&(_, probability)| probability > 0.0);
        prop_assert_eq!(got, defined(&params, &logits));
    }

    #[test]
    fn largest_matches_a_sort(values in prop::collection::vec(-50i8..50, 1..3000), k in 1usize..300, ascending: bool) {
        let logit = |value: i8| if value < -40 { f32::NEG_INFINITY } else { value.into() };
        let mut logits: Vec<f32> = values.into_iter().map(logit).collect();
        if ascending {
            logits.sort_by(f32::total_cmp);
        }
        let mut want: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        want.retain(|&(_, logit)| logit > f32::NEG_INFINITY);
        want.sort_by(better);
        want.truncate(k);
        let mut got = largest(&logits, k);
        got.sort_by(better);
        prop_assert_eq!(got, want);
    }

    #[test]
    fn nothing_that_a_caller_can_give_panics(
        logits in prop_oneof![
            prop::collection::vec(prop::num::f32::ANY, 0..50),
            prop::collection::vec(prop_oneof![prop::num::f32::NORMAL, Just(f32::NEG_INFINITY)], 0..50),
        ],
        prompt in prop::collection::vec(0u32..60, 0..20),
        vocab_limit in 0usize..60,
        params in (
            (prop::num::f32::POSITIVE, prop::option::of(1usize..60), 1e-9f32..=1.0, 0.0f32..=1.0),
            (prop::num::f32::POSITIVE, -2.0f32..=2.0, any::<u64>(), prop::sample::select(vec![None, Some(0), Some(3), Some(usize::MAX)])),
        ).prop_map(|((temperature, top_k, top_p, min_p), (repetition_penalty, presence_penalty, seed, logprobs))|
            SamplingParams {
                temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed: Some(seed), logprobs,
                ..Default::default()
            }),
    ) {
        if let Ok(mut sampler) = Sampler::new(params, &prompt, vocab_limit)
            && let Ok(sampled) = sampler.sample(&logits)
        {
            let token = sampled.token as usize;
            prop_assert!(token < vocab_limit && logits[token] > f32::NEG_INFINITY);
        }
    }
}

#[test]
fn draws_have_the_probabilities() {
    let all = [
        hot(11),
        SamplingParams { temperature: 0.7, ..hot(12) },
        SamplingParams { top_k: Some(5), ..hot(13) },
        SamplingParams { temperature: 1.8, top_p: 0.8, min_p: 0.1, ..hot(14) },
    ];
    for params in all {
        let mut expected = [0.0; LOGITS.len()];
        for (token, probability) in defined(&params, &LOGITS) {
            expected[token as usize] = probability;
        }
        let mut counts = [0; LOGITS.len()];
        let mut sampler = sampler(params.clone());
        for _ in 0..50_000 {
            counts[sampler.sample(&LOGITS).unwrap().token as usize] += 1;
        }
        assert_fits(&format!("{params:?}"), &counts, &expected);
    }
}

#[test]
fn neighbouring_seeds_and_steps_are_independent() {
    let logits = [0.0, 0.5, 1.0, 1.5];
    let single: Vec<f64> = defined(&hot(0), &logits).into_iter().map(|(_, probability)| probability).collect();
    let expected: Vec<f64> = single.iter().flat_map(|first| single.iter().map(move |second| first * second)).collect();
    let (mut steps, mut seeds) = ([0; 16], [0; 16]);
    let mut last = 0;
    for seed in 0..40_000 {
        let mut sampler = sampler(hot(seed));
        let [first, second] = [0; 2].map(|_| sampler.sample(&logits).unwrap().token as usize);
        steps[4 * first + second] += 1;
        seeds[4 * last + second] += 1;
        last = second;
    }
    assert_fits("two steps of one seed", &steps, &expected);
    assert_fits("one step of two seeds", &seeds, &expected);
}

/// The first outputs that the authors' C code gives for seed 0 (which the mix of the seed leaves alone).
#[test]
fn uniform_is_splitmix64() {
    for (step, output) in [(0, 0xe220_a839_7b1d_cdaf_u64), (1, 0x6e78_9e6a_a1b9_65f4), (2, 0x06c4_5d18_8009_454f)] {
        assert_eq!(uniform(0, step), (output >> 11) as f64 * 2f64.powi(-53));
    }
    // SplitMix64 itself gives seeds this far apart one stream.
    assert_ne!(uniform(0x9e37_79b9_7f4a_7c15, 0), uniform(0, 1));
}

#[test]
fn a_draw_never_takes_what_has_no_weight() {
    let candidates = [(3, 0.0), (5, 1.0), (8, 0.25), (9, 0.0)];
    assert_eq!(draw(&candidates, 0.0), 5);
    assert_eq!(draw(&candidates, 0.79), 5);
    assert_eq!(draw(&candidates, 0.81), 8);
    assert_eq!(draw(&candidates, 1.0), 8);
}

#[test]
fn a_reply_depends_on_seed_and_step_alone() {
    let params = SamplingParams { frequency_penalty: 0.5, ..hot(42) };
    let reply = |sampler: &mut Sampler, tokens: usize| -> Vec<u32> {
        (0..tokens).map(|_| sampler.sample(&LOGITS).unwrap().token).collect()
    };
    let whole = reply(&mut sampler(params.clone()), 64);

    let mut interrupted = sampler(params.clone());
    for &token in &whole[..20] {
        interrupted.accept(token);
    }
    assert_eq!(reply(&mut interrupted, 44), whole[20..]);
    assert_ne!(reply(&mut sampler(SamplingParams { seed: Some(43), ..params }), 64), whole);

    let unseeded = SamplingParams { seed: None, ..hot(0) };
    let mut first = sampler(unseeded.clone());
    let mut again = sampler(hot(first.seed()));
    assert_eq!(reply(&mut first, 64), reply(&mut again, 64));
    let seeds: HashSet<u64> = (0..100).map(|_| sampler(unseeded.clone()).seed()).collect();
    assert_eq!(seeds.len(), 100);
}

#[test]
fn greedy_takes_the_largest_logit() {
    let greedy = |logits: &[f32]| sampler(SamplingParams::default()).sample(logits).unwrap().token;
    assert_eq!(greedy(&LOGITS), 3);
    assert_eq!(greedy(&[1.0, 4.0, 2.0, 4.0]), 1);
    assert_eq!(greedy(&[-0.0, 0.0]), 0);
    assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY]), 1);
}

/// Wherever it is: logits are read in vectors and in parts.
#[test]
fn the_largest_logit_and_nan_are_found_anywhere() {
    for len in [1, 15, 16, 17, 255, 256, 257, 700] {
        for index in 0..len {
            let mut logits: Vec<f32> = (0..len).map(|i| -1.0 - (i * 37 % 11) as f32).collect();
            logits[index] = 1.0;
            logits[len - 1] = 1.0;
            let sample = |logits: &[f32]| sampler(SamplingParams::default()).sample(logits);
            assert_eq!(sample(&logits).unwrap().token as usize, index, "{len}");
            logits[index] = f32::NAN;
            assert!(sample(&logits).is_err(), "{index} of {len}");
        }
    }
}

#[test]
fn padding_rows_are_never_chosen() {
    let logits = [1.0, 2.0, 0.0, 1.5, 9.0, f32::NAN];
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, logprobs: Some(9), ..hot(3) };
        let mut sampler = Sampler::new(params, &[5, 4, 77], 4).unwrap();
        for _ in 0..200 {
            let sampled = sampler.sample(&logits).unwrap();
            assert!(sampled.token < 4);
            assert_eq!(sampled.logprobs.unwrap().top.len(), 4);
        }
    }
}

#[test]
fn unusable_logits_are_errors() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let cases: [(&[f32], &str); 5] = [
        (&[1.0, nan, 2.0], "sampler: NaN among the logits"),
        (&[-nan, 1.0, 2.0], "sampler: NaN among the logits"),
        (&[1.0, inf, 2.0], "sampler: +inf among the logits"),
        (&[-inf, -inf], "sampler: none of 2 logits is finite"),
        (&[], "sampler: none of 0 logits is finite"),
    ];
    for temperature in [0.0, 0.8] {
        for (logits, message) in cases {
            let error = sampler(SamplingParams { temperature, ..hot(1) }).sample(logits).unwrap_err();
            assert_eq!(error.to_string(), message, "{logits:?}");
        }
    }
}

#[test]
fn penalties_touch_what_they_should() {
    let logits = [2.0, -2.0, 2.0, -2.0, 2.0];
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..Default::default()
    };
    // Tokens 0 and 1 are in the prompt, 1 and 2 (twice) in the reply, 99 lies beyond the vocabulary.
    let mut sampler = Sampler::new(params, &[0, 1, 0, 99], usize::MAX).unwrap();
    for token in [2, 1, 2] {
        sampler.accept(token);
    }
    assert_eq!(*sampler.penalised(&logits), [1.0, -4.75, 0.0, -2.0, 2.0]);
    assert_eq!(sampler.sample(&logits).unwrap().token, 4);
    assert_eq!(sampler.counts[&4], 1);
}

#[test]
fn logprobs_are_the_models_own() {
    let logits = [1.0, 3.0, 2.0, 3.0];
    let mass: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let params = SamplingParams {
        temperature: 0.3,
        top_k: Some(1),
        repetition_penalty: 1.2,
        logprobs: Some(3),
        ..Default::default()
    };
    let mut sampler = Sampler::new(params.clone(), &[1, 3], usize::MAX).unwrap();
    let Sampled { token, logprobs: Some(Logprobs { chosen, top }) } = sampler.sample(&logits).unwrap() else {
        panic!("logprobs were asked for");
    };
    let is_logprob = |got: f32, logit: f64| (f64::from(got) - (logit - mass.ln())).abs() < 1e-6;
    assert_eq!(token, 1);
    assert!(is_logprob(chosen, 3.0), "{chosen}");
    assert_eq!(top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [1, 3, 2]);
    assert!(top.iter().all(|&(token, got)| is_logprob(got, logits[token as usize].into())), "{top:?}");

    let mut none = Sampler::new(SamplingParams { logprobs: Some(0), ..params.clone() }, &[], 4).unwrap();
    assert_eq!(none.sample(&logits).unwrap().logprobs.unwrap().top, []);
    let mut absent = Sampler::new(SamplingParams { logprobs: None, ..params }, &[], 4).unwrap();
    assert_eq!(absent.sample(&logits).unwrap().logprobs, None);
}

#[test]
fn the_device_may_draw_what_needs_no_whole_row() {
    let plain = SamplingParams::default();
    let draw = |params: SamplingParams| sampler(params).draw(0);
    assert_eq!(draw(plain.clone()), Some(Draw::MOST_LIKELY));
    let drawn = SamplingParams { top_k: Some(20), top_p: 0.9, min_p: 0.1, ..hot(7) };
    let ours = draw(drawn.clone()).unwrap();
    assert_eq!((ours.temperature, ours.top_k, ours.top_p, ours.min_p), (1.0, 20, 0.9, 0.1));
    // A token on, the position is that of the next step.
    let mut sampler = sampler(drawn.clone());
    let (next, ahead) = (sampler.draw(0).unwrap().position, sampler.draw(1).unwrap().position);
    assert!(next == ours.position && next != ahead);
    sampler.accept(3);
    assert_eq!(sampler.draw(0).unwrap().position, ahead);
    assert_eq!(draw(hot(0)), None);
    assert_eq!(draw(SamplingParams { top_k: Some(MAX_K + 1), ..hot(0) }), None);
    for params in [plain, drawn] {
        assert_eq!(draw(SamplingParams { logprobs: Some(0), ..params.clone() }), None);
        assert_eq!(draw(SamplingParams { repetition_penalty: 1.1, ..params.clone() }), None);
        assert_eq!(draw(SamplingParams { presence_penalty: 0.1, ..params.clone() }), None);
        assert_eq!(draw(SamplingParams { frequency_penalty: 0.1, ..params }), None);
    }
}

/// The device's definition of a draw is the sampler's: the same token of the same numbers.
#[test]
fn a_draw_is_what_the_sampler_would_choose() {
    let logits: Vec<f32> = (0..300).map(|i| ((i * 7919 % 1000) as f32 / 100.0).sin() * 4.0).collect();
    let rows = candle_core::Tensor::from_vec(logits.clone(), (1, 300), &candle_core::Device::Cpu).unwrap();
    for seed in 0..500 {
        let top_p = [1.0, 0.95, 0.5, 0.1][seed as usize % 4];
        let min_p = [0.0, 0.05, 0.5][seed as usize % 3];
        let params = SamplingParams { top_k: Some(1 + seed as usize % MAX_K), top_p, min_p, ..hot(seed) };
        let mut sampler = sampler(params);
        let draws = kernels::sampling::Draws::new(&[sampler.draw(0).unwrap()], rows.device()).unwrap();
        let drawn = kernels::sampling::sample(&rows, 300, &draws).unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(drawn, [sampler.sample(&logits).unwrap().token], "seed {seed}");
    }
}

#[test]
fn parameters_out_of_range_are_named() {
    type Set = fn(&mut SamplingParams, f32);
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let fields: [(&str, Set, &[f32], &[f32]); 6] = [
        ("temperature", |p, v| p.temperature = v, &[0.0, 1e-40, 100.0], &[-0.1, nan, inf]),
        ("top_p", |p, v| p.top_p = v, &[1e-6, 1.0], &[0.0, -0.5, 1.001, nan]),
        ("min_p", |p, v| p.min_p = v, &[0.0, 1.0], &[-0.1, 1.5, nan]),
        ("repetition_penalty", |p, v| p.repetition_penalty = v, &[0.5, 3.0], &[0.0, -1.0, nan, inf]),
        ("presence_penalty", |p, v| p.presence_penalty = v, &[-2.0, 2.0], &[-2.1, 2.1, nan]),
        ("frequency_penalty", |p, v| p.frequency_penalty = v, &[-2.0, 2.0], &[-2.1, 2.1, nan]),
    ];
    for (name, set, good, bad) in fields {
        let with = |value| {
            let mut params = SamplingParams::default();
            set(&mut params, value);
            params
        };
        for &value in good {
            with(value).validate().unwrap();
        }
        for &value in bad {
            let error = Sampler::new(with(value), &[], 1).unwrap_err();
            assert!(
                matches!(&error, Error::Request(text) if text.starts_with(&format!("{name}: got {value}, expected "))),
                "{error}"
            );
        }
    }
    for (params, name) in [
        (SamplingParams { top_k: Some(0), ..Default::default() }, "top_k"),
        (SamplingParams { max_tokens: 0, ..Default::default() }, "max_tokens"),
    ] {
        assert_eq!(params.validate().unwrap_err().to_string(), format!("{name}: got 0, expected at least 1"));
    }
}

#[test]
fn generation_config_gives_the_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generation_config.json");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        SamplingParams::from_generation_config(&path)
    };
    let plain = SamplingParams::default();

    assert_eq!(SamplingParams::from_generation_config(&folder.path().join("absent.json")).unwrap(), plain);
    assert_eq!(read("{}").unwrap(), plain);
    let text = r#"{"eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95}"#;
    let qwen3 = SamplingParams { temperature: 0.6, top_k: Some(20), top_p: 0.95, ..plain.clone() };
    assert_eq!(read(text).unwrap(), qwen3);
    assert_eq!(read(&text.replace("true", "false")).unwrap(), SamplingParams { temperature: 0.0, ..qwen3 });
    assert_eq!(
        read(r#"{"do_sample": true, "top_k": 0, "top_p": null, "min_p": 0.1, "repetition_penalty": 2}"#).unwrap(),
        SamplingParams { temperature: 1.0, min_p: 0.1, repetition_penalty: 2.0, ..plain }
    );

    for (text, message) in [
        (r#"{"do_sample": true, "temperature": -1}"#, "temperature: got -1, expected a finite number, at least 0"),
        (r#"{"top_k": "many"}"#, "invalid type: string \"many\", expected usize at line 1 column 16"),
        (r#"{"top_p": NaN}"#, "expected value at line 1 column 11"),
    ] {
        assert_eq!(read(text).unwrap_err().to_string(), format!("{}: {message}", path.display()));
    }
    assert!(matches!(SamplingParams::from_generation_config(folder.path()), Err(Error::Io { .. })));
}
