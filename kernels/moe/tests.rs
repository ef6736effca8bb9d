//! Routing and experts against the reference, by hand, and each row against the same row alone.

use candle_core::Device;
use half::{bf16, f16};

use super::*;
use crate::activation::{Activation, gated_activation};
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated, emulator, suspended};
use crate::quantized::{self, Quantization};
use crate::simd::tests::portable;
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).expect("a float tensor").into_iter().map(f32::to_bits).collect()
}

fn ids(routing: &Routing) -> Result<Vec<u32>> {
    routing.experts.flatten_all()?.to_vec1()
}

fn dense(gate_up: &Tensor, down: &Tensor) -> Result<Experts> {
    Experts::new(Stack::Dense(gate_up.clone()), Stack::Dense(down.clone()))
}

/// `tensor` `[N, ..]` as a part of a larger one of NaN.
fn framed(tensor: &Tensor) -> Result<Tensor> {
    let mut shape = tensor.dims().to_vec();
    shape[0] = 3;
    let frame = poisoned(&shape, tensor.dtype(), tensor.device())?;
    Tensor::cat(&[&frame, tensor, &frame], 0)?.narrow(0, 3, tensor.dim(0)?)
}

#[test]
fn routing_is_the_reference() -> Result<()> {
    let mut random = Random::new(1);
    for dtype in FLOATS {
        for (n, e, k) in [(1, 1, 1), (1, 256, 8), (3, 7, 7), (65, 8, 3), (130, 100, 1), (63, 65, 64)] {
            let logits = random.tensor(&[n, e], 2.0, dtype, &Device::Cpu)?;
            let (want_ids, want_weights) = reference::route(&values(&logits)?, e, k);
            let on_devices = devices().into_iter().map(|device| logits.to_device(&device));
            for logits in on_devices.chain([framed(&logits)]) {
                let logits = logits?;
                let got = route(&logits, k)?;
                assert_eq!((got.weights.dims(), got.weights.dtype()), (&[n, k][..], dtype));
                // In f16 and bf16 many logits are equal.
                assert_eq!(ids(&got)?, want_ids, "{dtype:?} {k} of {e}");
                let name = format!("weights {dtype:?} {k} of {e}");
                assert_close(&name, &values(&got.weights)?, &want_weights, op_limit(dtype));
            }
        }
    }
    Ok(())
}

#[test]
fn routing_by_hand() -> Result<()> {
    // Of probabilities 1/10, 4/10, 3/10, 2/10.
    let logits = Tensor::new(&[[1f32, 4.0, 3.0, 2.0]], &Device::Cpu)?.log()?;
    let got = route(&logits, 2)?;
    assert_eq!(ids(&got)?, [1, 2]);
    assert_close("weights", &values(&got.weights)?, &[4.0 / 7.0, 3.0 / 7.0], 1e-6);
    Ok(())
}

#[test]
fn of_equal_experts_the_lower_index_comes_first() -> Result<()> {
    let logits = [[0f32, 2.0, 0.0, 2.0, 2.0, 0.0], [1.0; 6], [5.0, 0.0, 0.0, 0.0, 0.0, 9.0]];
    let got = route(&Tensor::new(&logits, &Device::Cpu)?, 4)?;
    assert_eq!(ids(&got)?, [[1, 3, 4, 0], [0, 1, 2, 3], [5, 0, 1, 2]].concat());
    let weights = values(&got.weights)?;
    assert_eq!(weights[4..8], [0.25; 4]);
    // More of them than a simdgroup has lanes.
    let got = route(&Tensor::zeros((1, 70), DType::F32, &Device::Cpu)?, 40)?;
    assert_eq!(ids(&got)?, (0..40).collect::<Vec<u32>>());
    Ok(())
}

#[test]
fn extreme_logits_route() -> Result<()> {
    let logits = [[1e30f32, -1e30, 0.0], [-1e30, f32::NEG_INFINITY, -1e30], [0.0, f32::NAN, 1.0]];
    let got = route(&Tensor::new(&logits, &Device::Cpu)?, 2)?;
    let (ids, weights) = (ids(&got)?, values(&got.weights)?);
    assert_eq!((ids[0], weights[0], weights[1]), (0, 1.0, 0.0));
    assert_eq!((&ids[2..4], &weights[2..4]), (&[0, 2][..], &[0.5, 0.5][..]));
    assert!(ids[4] < 3 && ids[5] < 3 && ids[4] != ids[5] && weights[4].is_nan() && weights[5].is_nan());
    Ok(())
}

#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    hidden: usize,
    intermediate: usize,
    num_experts: usize,
    k: usize,
    pick: Pick,
}

#[derive(Clone, Copy, Debug)]
enum Pick {
    /// `k` different experts for each token.
    Random,
    /// The same `k`, not in order, for all.
    Same,
}

const CASES: [Case; 15] = {
    const fn case(n: usize, sizes: (usize, usize), (k, num_experts): (usize, usize), pick: Pick) -> Case {
        Case { n, hidden: sizes.0, intermediate: sizes.1, num_experts, k, pick }
    }
    [
        case(1, (1, 1), (1, 1), Pick::Random),
        case(1, (63, 65), (8, 40), Pick::Random),
        case(2, (100, 7), (3, 5), Pick::Random),
        case(5, (33, 40), (4, 4), Pick::Random),
        case(17, (64, 24), (2, 9), Pick::Random),
        case(65, (40, 33), (3, 8), Pick::Random),
        case(40, (24, 100), (1, 6), Pick::Same),
        case(7, (128, 20), (3, 6), Pick::Same),
        case(300, (16, 12), (2, 4), Pick::Random),
        // Of sizes for tensor cores: few tokens, some, and many for an expert.
        case(1, (64, 32), (8, 12), Pick::Random),
        case(4, (288, 64), (3, 5), Pick::Random),
        case(9, (96, 32), (3, 40), Pick::Random),
        case(21, (544, 96), (2, 6), Pick::Same),
        case(40, (128, 64), (2, 9), Pick::Random),
        case(150, (256, 128), (3, 5), Pick::Random),
    ]
};

struct Inputs {
    x: Tensor,
    routing: Routing,
    gate_up: Tensor,
    down: Tensor,
}

impl Inputs {
    fn new(case: Case, dtype: DType, stored: DType, random: &mut Random) -> Result<Self> {
        let Case { n, hidden, intermediate, num_experts, k, pick } = case;
        let cpu = &Device::Cpu;
        let same = random.permutation(num_experts);
        let ids: Vec<u32> = (0..n)
            .flat_map(|_| match pick {
                Pick::Random => random.permutation(num_experts)[..k].to_vec(),
                Pick::Same => same[..k].to_vec(),
            })
            .collect();
        let weights: Vec<f32> = (0..n * k).map(|_| 0.1 + random.below(100) as f32 / 100.0).collect();
        let routing = Routing {
            experts: Tensor::from_vec(ids, (n, k), cpu)?,
            weights: Tensor::from_vec(weights, (n, k), cpu)?.to_dtype(dtype)?,
        };
        let scale = |inner: usize| (inner as f32).powf(-0.5);
        Ok(Self {
            x: random.tensor(&[n, hidden], 1.0, dtype, cpu)?,
            gate_up: random.tensor(&[num_experts, 2 * intermediate, hidden], scale(hidden), stored, cpu)?,
            down: random.tensor(&[num_experts, hidden, intermediate], scale(intermediate), stored, cpu)?,
            routing,
        })
    }

    fn reference(&self, case: Case) -> Result<Vec<f32>> {
        let (gate_up, down) = (values(&self.gate_up)?, values(&self.down)?);
        let Case { hidden, intermediate, .. } = case;
        let round = match self.x.dtype() {
            DType::F32 => |x| x,
            DType::F16 => |x| f16::from_f32(x).to_f32(),
            _ => |x| bf16::from_f32(x).to_f32(),
        };
        let experts = reference::Experts { gate_up: &gate_up, down: &down, hidden, intermediate, round };
        Ok(reference::sparse_mlp(&values(&self.x)?, &ids(&self.routing)?, &values(&self.routing.weights)?, &experts))
    }

    /// NaN for the weights of experts that no token goes to: they must not be read.
    fn poison_unused(&mut self) -> Result<()> {
        let used = ids(&self.routing)?;
        for matrices in [&mut self.gate_up, &mut self.down] {
            let (num_experts, rows, columns) = matrices.dims3()?;
            let of = |e: usize| match used.contains(&(e as u32)) {
                true => matrices.get(e),
                false => poisoned(&[rows, columns], matrices.dtype(), matrices.device()),
            };
            let all = (0..num_experts).map(of).collect::<Result<Vec<_>>>()?;
            *matrices = Tensor::stack(&all, 0)?;
        }
        Ok(())
    }

    fn packed(&self, format: Quantization) -> Result<Experts> {
        let pack = |matrices: &Tensor| -> Result<Vec<QuantizedMatrix>> {
            let (num_experts, rows, columns) = matrices.dims3()?;
            let values = values(matrices)?;
            let pack = |e: usize| {
                let row = |row: usize, target: &mut [f32]| {
                    target.copy_from_slice(&values[(e * rows + row) * columns..][..columns])
                };
                QuantizedMatrix::pack(format, [rows, columns], row)
            };
            (0..num_experts).map(pack).collect()
        };
        Experts::new(Stack::Packed(pack(&self.gate_up)?), Stack::Packed(pack(&self.down)?))
    }
}

fn experts_are_the_reference() -> Result<()> {
    let mut random = Random::new(2);
    for case in CASES {
        for dtype in FLOATS {
            for stored in FLOATS {
                let mut inputs = Inputs::new(case, dtype, stored, &mut random)?;
                let want = inputs.reference(case)?;
                inputs.poison_unused()?;
                // Metal takes experts of the activations' dtype, which is what its models load.
                let is_taken = |device: &Device| stored == dtype || !(device.is_metal() || emulator().is_some());
                for device in devices().into_iter().filter(is_taken) {
                    let on = |tensor: &Tensor| framed(tensor)?.to_device(&device);
                    let Routing { experts: ids, weights } = &inputs.routing;
                    let routing = Routing { experts: ids.to_device(&device)?, weights: weights.to_device(&device)? };
                    let experts = dense(&on(&inputs.gate_up)?, &on(&inputs.down)?)?;
                    let got = sparse_mlp(&on(&inputs.x)?, &routing, &experts)?;
                    assert_eq!((got.dims(), got.dtype()), (inputs.x.dims(), dtype));
                    let name = format!("sparse_mlp {case:?} {dtype:?} by {stored:?} {device:?}");
                    assert_close(&name, &values(&got)?, &want, op_limit(dtype));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn experts_are_the_reference_with_any_dtypes() -> Result<()> {
    experts_are_the_reference()
}

/// Packed experts on an accelerator, where activations are not rounded, beside the reference over unpacked weights. Those of
/// two products in a row may be rounded to the dtype.
fn run_packed(case: Case, format: Quantization, dtype: DType, device: &Device) -> Result<()> {
    let mut inputs = Inputs::new(case, dtype, DType::F32, &mut Random::new(5))?;
    let packed = suspended(|| inputs.packed(format))?;
    let (Stack::Packed(gate_up), Stack::Packed(down)) = (&packed.gate_up, &packed.down) else { panic!("packed above") };
    let unpacked = |matrices: &[QuantizedMatrix]| -> Result<Tensor> {
        let ids = |matrix: &QuantizedMatrix| Tensor::arange(0, matrix.dims()[0] as u32, &Device::Cpu);
        let matrices = matrices.iter().map(|matrix| matrix.rows(&ids(matrix)?)).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&matrices, 0)
    };
    let weights = suspended(|| Ok::<_, candle_core::Error>((unpacked(gate_up)?, unpacked(down)?)))?;
    let uploaded = |matrices: &[QuantizedMatrix]| -> Result<Stack> {
        let matrices = matrices.iter().map(|matrix| matrix.uploaded(device)).collect::<Result<_>>()?;
        Ok(Stack::Packed(matrices))
    };
    let experts = Experts::new(uploaded(gate_up)?, uploaded(down)?)?;
    (inputs.gate_up, inputs.down) = weights;
    let Routing { experts: ids, weights } = &inputs.routing;
    let routing = Routing { experts: ids.to_device(device)?, weights: weights.to_device(device)? };
    let got = sparse_mlp(&inputs.x.to_device(device)?, &routing, &experts)?;
    assert_close(
        &format!("{case:?} {format:?} {device:?}"),
        &values(&got)?,
        &inputs.reference(case)?,
        2.0 * op_limit(dtype),
    );
    Ok(())
}

#[test]
fn metal_kernels_are_the_reference() -> Result<()> {
    emulated(|| {
        routing_is_the_reference()?;
        routing_by_hand()?;
        of_equal_experts_the_lower_index_comes_first()?;
        extreme_logits_route()?;
        experts_are_the_reference()?;
        weights_are_applied_to_the_results()?;
        packed_experts(&Device::Cpu)
    })
}

fn packed_experts(device: &Device) -> Result<()> {
    for (i, case) in CASES.into_iter().enumerate() {
        let format = [Quantization::Q8, Quantization::Q4][i % 2];
        run_packed(case, format, [DType::F32, DType::BF16, DType::F16][i % 3], device)?;
    }
    Ok(())
}

#[test]
fn packed_experts_are_the_reference_on_accelerators() -> Result<()> {
    devices().iter().filter(|device| !device.is_cpu()).try_for_each(packed_experts)
}

/// Few and many pairs, some experts without any, rows at an offset.
fn smoke() -> Result<()> {
    let mut random = Random::new(6);
    let case = Case { n: 3, hidden: 36, intermediate: 20, num_experts: 7, k: 3, pick: Pick::Random };
    for case in [case, Case { n: 40, pick: Pick::Same, ..case }, Case { n: 45, ..case }] {
        let mut inputs = Inputs::new(case, DType::F32, DType::F32, &mut random)?;
        let want = inputs.reference(case)?;
        inputs.poison_unused()?;
        let routing =
            Routing { experts: framed_ids(&inputs.routing.experts)?, weights: framed(&inputs.routing.weights)? };
        let experts = dense(&framed(&inputs.gate_up)?, &framed(&inputs.down)?)?;
        let got = sparse_mlp(&framed(&inputs.x)?, &routing, &experts)?;
        assert_close(&format!("{case:?}"), &values(&got)?, &want, op_limit(DType::F32));
    }
    let logits = random.tensor(&[7, 70], 2.0, DType::F32, &Device::Cpu)?;
    let (want_ids, want_weights) = reference::route(&values(&logits)?, 70, 40);
    let got = route(&framed(&logits)?, 40)?;
    assert_eq!(ids(&got)?, want_ids);
    assert_close("weights", &values(&got.weights)?, &want_weights, op_limit(DType::F32));
    of_equal_experts_the_lower_index_comes_first()?;
    extreme_logits_route()
}

/// As [`framed`], for ids.
fn framed_ids(ids: &Tensor) -> Result<Tensor> {
    let frame = Tensor::full(1_000_000u32, (3, ids.dim(1)?), ids.device())?;
    Tensor::cat(&[&frame, ids, &frame], 0)?.narrow(0, 3, ids.dim(0)?)
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("row >= sizes.rows", "row > sizes.rows"),
        ("has_nan != 0 ? NAN : 0", "0"),
        ("taken |= 1u << place / LANES", "taken |= 1u"),
        ("(other == best && other_place < place)", "(other == best && other_place > place)"),
        ("p > best", "p >= best"),
        ("total += best", "total = best"),
        ("j += LANES)\n    weights", "j += 2 * LANES)\n    weights"),
        ("ids[pair] < expert", "ids[pair] <= expert"),
        ("expert > sizes.experts", "expert >= sizes.experts"),
        ("ids[pair] == expert", "ids[pair] >= expert"),
        ("column >= sizes.hidden", "column > sizes.hidden"),
        ("own[j] >= next && own[j] < lowest", "own[j] >= next"),
        ("next = lowest + 1", "next = lowest + 2"),
        ("pair * sizes.hidden", "place * sizes.hidden"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

/// Of the products, what experts alone ask for.
#[test]
fn mutants_of_metal_products_are_noticed() {
    let mutants = [
        ("starts[middle] / tile_rows + middle <= tile", "starts[middle] / tile_rows + middle < tile"),
        ("(group.y - (starts[expert] / TILE_ROWS + expert))", "group.y"),
        ("end = starts[expert + 1]", "end = sizes.rows"),
        ("at / sizes.divisor", "at"),
        ("matrix * outer * inner", "0 * outer * inner"),
        ("IS_ROUTED ? order[first + row] : first + row", "first + row"),
        ("IS_ROUTED ? order[row] : row", "row"),
    ];
    assert_mutants_fail(&crate::linear::metal::PRODUCTS, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

#[test]
fn portable_lanes_are_the_reference() -> Result<()> {
    portable(experts_are_the_reference)
}

/// One token, two experts of one channel: by hand, and with the weight outside of the activation.
#[test]
fn weights_are_applied_to_the_results() -> Result<()> {
    let cpu = &Device::Cpu;
    let ln_3 = 3f32.ln();
    // silu(ln 3) is 3/4 ln 3, silu(-ln 3) is -1/4 ln 3.
    let gate_up = Tensor::new(&[[[ln_3], [2.0]], [[-ln_3], [4.0]], [[f32::NAN], [f32::NAN]]], cpu)?;
    let down = Tensor::new(&[[[10f32]], [[100.0]], [[f32::NAN]]], cpu)?;
    let experts = dense(&gate_up, &down)?;
    let routing = Routing { experts: Tensor::new(&[[1u32, 0]], cpu)?, weights: Tensor::new(&[[0.25f32, 0.75]], cpu)? };
    let got = sparse_mlp(&Tensor::new(&[[1f32]], cpu)?, &routing, &experts)?;
    let want = 0.75 * 10.0 * 2.0 * 0.75 * ln_3 - 0.25 * 100.0 * 4.0 * 0.25 * ln_3;
    assert_close("sum", &values(&got)?, &[want], 1e-6);
    Ok(())
}

/// Each expert by itself through the public ops, and the terms of a token added in the order of the experts.
#[test]
fn packed_experts_are_packed_products() -> Result<()> {
    let mut random = Random::new(3);
    for case in CASES {
        for format in [Quantization::Q8, Quantization::Q4] {
            for dtype in FLOATS {
                let inputs = Inputs::new(case, dtype, DType::F32, &mut random)?;
                let experts = inputs.packed(format)?;
                let (Stack::Packed(gate_up), Stack::Packed(down)) = (&experts.gate_up, &experts.down) else {
                    panic!("packed above")
                };
                let (ids, weights) = (inputs.routing.experts.to_vec2::<u32>()?, values(&inputs.routing.weights)?);
                let mut want = vec![0f32; case.n * case.hidden];
                for (token, (ids, weights)) in ids.iter().zip(weights.chunks(case.k)).enumerate() {
                    let mut terms: Vec<_> = ids.iter().zip(weights).collect();
                    terms.sort_by_key(|(id, _)| **id);
                    for (&id, weight) in terms {
                        let x = inputs.x.narrow(0, token, 1)?;
                        let activated =
                            gated_activation(&quantized::linear(&x, &gate_up[id as usize])?, Activation::Silu)?;
                        let term = values(&quantized::linear(&activated, &down[id as usize])?)?;
                        let row = want[token * case.hidden..].iter_mut();
                        row.zip(term).for_each(|(want, term)| *want += weight * term);
                    }
                }
                let want = Tensor::from_vec(want, (case.n, case.hidden), &Device::Cpu)?.to_dtype(dtype)?;
                let got = sparse_mlp(&inputs.x, &inputs.routing, &experts)?;
                assert_eq!(bits(&got), bits(&want), "{case:?} {format:?} {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_does_not_depend_on_the_others_or_on_threads() -> Result<()> {
    let case = Case { n: 70, hidden: 100, intermediate: 40, num_experts: 12, k: 4, pick: Pick::Random };
    let inputs = Inputs::new(case, DType::F32, DType::BF16, &mut Random::new(4))?;
    let part = |start: usize, rows: usize| -> Result<(Tensor, Routing)> {
        let cut = |tensor: &Tensor| tensor.narrow(0, start, rows);
        let Routing { experts, weights } = &inputs.routing;
        Ok((cut(&inputs.x)?, Routing { experts: cut(experts)?, weights: cut(weights)? }))
    };
    for experts in
        [dense(&inputs.gate_up, &inputs.down)?, inputs.packed(Quantization::Q8)?, inputs.packed(Quantization::Q4)?]
    {
        let run = |start: usize, rows: usize| -> Result<Vec<u32>> {
            let (x, routing) = part(start, rows)?;
            Ok(bits(&sparse_mlp(&x, &routing, &experts)?))
        };
        let alone = (0..70).map(|row| run(row, 1)).collect::<Result<Vec<_>>>()?;
        for rows in [1, 2, 3, 5, 8, 33, 70] {
            for threads in [1, 2, 3, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
                let got = pool.install(|| run(70 - rows, rows))?;
                assert_eq!(got, alone[70 - rows..].concat(), "{rows} rows, {threads} threads");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let refused = |result: Result<Tensor>, expected: &str| {
        let error = result.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    for k in [0, 5] {
        refused(route(&zeros(&[2, 4])?, k).map(|routing| routing.weights), &format!("route: {k} of 4 experts"));
    }
    let error = dense(&zeros(&[4, 6, 5])?, &zeros(&[4, 5, 2])?).err().expect("6 is not 4").to_string();
    assert!(error.contains("gate_up is [4, 6, 5], expected [4, 4, 5]"), "{error}");
    assert!(Experts::new(Stack::Packed(vec![]), Stack::Packed(vec![])).is_err());

    let experts = dense(&zeros(&[4, 6, 5])?, &zeros(&[4, 5, 3])?)?;
    let routing = |ids: &[u32]| -> Result<Routing> {
        Ok(Routing { experts: Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, weights: zeros(&[1, ids.len()])? })
    };
    refused(sparse_mlp(&zeros(&[1, 6])?, &routing(&[0])?, &experts), "x is [1, 6], expected [N, 5]");
    refused(sparse_mlp(&zeros(&[2, 5])?, &routing(&[0])?, &experts), "experts are [1, 1] U32, expected u32 [2, k]");
    refused(sparse_mlp(&zeros(&[1, 5])?, &routing(&[1, 4])?, &experts), "expert 4, there are 4");
    let routing = Routing { weights: zeros(&[1, 2])?, ..routing(&[0])? };
    refused(sparse_mlp(&zeros(&[1, 5])?, &routing, &experts), "weights are [1, 2] F32, expected F32 [1, 1]");
    Ok(())
}
