use std::cell::Cell;

use half::bf16;

use super::*;
use crate::simd::tests::INSTRUCTIONS;
use crate::testing::Random;

thread_local! {
    static USED: Cell<bool> = const { Cell::new(false) };
}

/// Registers or not, if the test at hand chose.
pub(super) fn forced() -> Option<bool> {
    match USED.get() {
        true => Some(true),
        false => INSTRUCTIONS.get().map(|_| false),
    }
}

/// Runs `f` with the registers, be they emulated, in what it runs on this thread.
pub(crate) fn with_tiles<R>(f: impl FnOnce() -> R) -> R {
    USED.set(true);
    let result = f();
    USED.set(false);
    result
}

/// Registers in memory, and the instructions' arithmetic.
pub(super) struct Emulated {
    widths: [usize; REGISTERS],
    rows: [[[u8; WIDTH]; ROWS]; REGISTERS],
}

impl Emulated {
    pub fn new(widths: [usize; REGISTERS]) -> Self {
        Self { widths, rows: [[[0; WIDTH]; ROWS]; REGISTERS] }
    }

    fn multiply<const SUMS: usize, const A: usize, const B: usize>(
        &mut self,
        product: impl Fn([u8; 4], &[u8; WIDTH], &[[u8; WIDTH]; ROWS], usize) -> [u8; 4],
    ) {
        assert_eq!((self.widths[A], self.widths[B]), (4 * ROWS, self.widths[SUMS]));
        let (a, b) = (self.rows[A], self.rows[B]);
        for (sums, a) in self.rows[SUMS].iter_mut().zip(&a) {
            for n in 0..self.widths[SUMS] / 4 {
                let sum = &mut sums.as_chunks_mut().0[n];
                *sum = product(*sum, a, &b, n);
            }
        }
    }
}

fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn widened(row: &[u8], i: usize) -> f32 {
    flushed(bf16::from_ne_bytes([row[2 * i], row[2 * i + 1]]).to_f32())
}

impl Tiles for Emulated {
    fn zero<const TILE: usize>(&mut self) {
        self.rows[TILE] = [[0; WIDTH]; ROWS];
    }
    fn load<const TILE: usize, E: Copy>(&mut self, source: &[E], stride: usize) {
        let width = self.widths[TILE];
        self.rows[TILE] = [[0; WIDTH]; ROWS];
        for (m, row) in self.rows[TILE].iter_mut().enumerate() {
            let source = &source[m * stride..][..width / size_of::<E>()];
            // SAFETY: both have the length.
            unsafe { std::ptr::copy_nonoverlapping(source.as_ptr().cast(), row.as_mut_ptr(), width) }
        }
    }
    fn store<const TILE: usize, E: Copy>(&mut self, target: &mut [E], stride: usize) {
        let width = self.widths[TILE];
        for (m, row) in self.rows[TILE].iter().enumerate() {
            let target = &mut target[m * stride..][..width / size_of::<E>()];
            // SAFETY: both have the length.
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), target.as_mut_ptr().cast(), width) }
        }
    }
    fn multiply_bytes<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        self.multiply::<SUMS, A, B>(|sum, a, b, n| {
            let products = (0..WIDTH).map(|k| i32::from(a[k] as i8) * i32::from(b[k / 4][4 * n + k % 4] as i8));
            (i32::from_ne_bytes(sum) + products.sum::<i32>()).to_ne_bytes()
        })
    }
    fn multiply_bf16<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        self.multiply::<SUMS, A, B>(|sum, a, b, n| {
            let half = |odd: usize| {
                (0..ROWS)
                    .fold(0f32, |sum, k| flushed(widened(a, 2 * k + odd).mul_add(widened(&b[k], 2 * n + odd), sum)))
            };
            flushed(flushed(f32::from_ne_bytes(sum)) + flushed(half(0) + half(1))).to_ne_bytes()
        })
    }
}

/// What a chain of products leaves of operands at `widths` columns.
struct Chain<'a> {
    bytes: &'a [u8],
    columns: usize,
    is_bf16: bool,
    sums: &'a mut [u8],
}

impl Kernel for Chain<'_> {
    fn run<T: Tiles>(self, tiles: &mut T) {
        let (row, stride) = (4 * self.columns, 4 * self.columns + 4);
        tiles.load::<0, _>(self.bytes, row);
        for bytes in self.bytes[ROWS * row..].chunks_exact(ROWS * (WIDTH + 2 + row)) {
            tiles.load::<1, _>(bytes, WIDTH + 2);
            tiles.load::<2, _>(&bytes[ROWS * (WIDTH + 2)..], row);
            match self.is_bf16 {
                true => tiles.multiply_bf16::<0, 1, 2>(),
                false => tiles.multiply_bytes::<0, 1, 2>(),
            }
        }
        tiles.store::<0, _>(self.sums, stride);
    }
}

/// The emulation is the instructions, to the bit: subnormals, infinities and numbers of every size among them.
#[test]
fn emulated_registers_are_the_machines() {
    if !is_available() {
        return eprintln!("no AMX: its emulation was compared with nothing");
    }
    let mut random = Random::new(1);
    for columns in [1, 3, 16] {
        for is_bf16 in [false, true] {
            for spread in [1, 20, 250] {
                let row = 4 * columns;
                let mut bytes: Vec<u8> =
                    (0..ROWS * row + 5 * ROWS * (WIDTH + 2 + row)).map(|_| random.next_u64() as u8).collect();
                if is_bf16 {
                    let mut value = |bytes: &mut [u8]| {
                        let exponent = (random.next_u64() % spread) as i32 - spread as i32 / 2;
                        let value = random.normal(1.0) * (exponent as f32).exp2();
                        match bytes.len() {
                            4 => bytes.copy_from_slice(&value.to_ne_bytes()),
                            _ => bytes.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
                        }
                    };
                    let (sums, rest) = bytes.split_at_mut(ROWS * row);
                    sums.chunks_exact_mut(4).for_each(&mut value);
                    rest.chunks_exact_mut(2).for_each(&mut value);
                }
                let stored = ROWS * (row + 4);
                let (mut want, mut got) = (vec![7; stored], vec![7; stored]);
                let mut widths = [WIDTH; REGISTERS];
                (widths[0], widths[2]) = (row, row);
                Chain { bytes: &bytes, columns, is_bf16, sums: &mut want }.run(&mut Emulated::new(widths));
                dispatch(widths, Chain { bytes: &bytes, columns, is_bf16, sums: &mut got });
                if is_bf16 {
                    // One NaN is as good as another.
                    for bytes in got.as_chunks_mut::<4>().0.iter_mut().chain(want.as_chunks_mut().0) {
                        if f32::from_ne_bytes(*bytes).is_nan() {
                            *bytes = f32::NAN.to_ne_bytes();
                        }
                    }
                }
                assert_eq!(got, want, "{columns} columns, bf16 {is_bf16}, spread {spread}");
            }
        }
    }
}
