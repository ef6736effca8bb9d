//! AMX: eight registers of sixteen rows of 64 bytes, and products of two of them.
//!
//! A kernel is written once, generic over [`Tiles`], as the `run` of a [`Kernel`]. The intrinsics are not stable, so the
//! instructions stand in assembly. The compiler never touches the registers, which keep what they hold from one block
//! of assembly to the next. Tests run the kernels on [`Emulated`] registers where a machine has none.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;

/// Rows of a register.
pub(crate) const ROWS: usize = 16;
/// Bytes of a row.
pub(crate) const WIDTH: usize = 64;
/// Registers.
const REGISTERS: usize = 8;

/// A computation over registers, with its operands. It hands nothing to other threads, whose work would come back to
/// this one and its registers.
pub(crate) trait Kernel {
    fn run<T: Tiles>(self, tiles: &mut T);
}

/// The registers, by number. Their rows may be shorter than they could be; see [`dispatch`].
pub(crate) trait Tiles {
    fn zero<const TILE: usize>(&mut self);
    /// Loads rows that begin `stride` elements apart.
    ///
    /// # Panics
    ///
    /// `source` ends before the last row.
    fn load<const TILE: usize, E: Copy>(&mut self, source: &[E], stride: usize);
    /// Stores rows `stride` elements apart.
    ///
    /// # Panics
    ///
    /// `target` ends before the last row.
    fn store<const TILE: usize, E: Copy>(&mut self, target: &mut [E], stride: usize);
    /// `sums[m][n] += sum_k a[m][k] * b[k / 4][4 n + k % 4]`, of signed bytes in i32.
    fn multiply_bytes<const SUMS: usize, const A: usize, const B: usize>(&mut self);
    /// `sums[m][n] += sum_k a[m][k] * b[k / 2][2 n + k % 2]`, of bf16 in f32: even and odd `k` are summed apart, each in
    /// fused steps from zero, then added up, then added to `sums`. Subnormal operands and results are zero.
    fn multiply_bf16<const SUMS: usize, const A: usize, const B: usize>(&mut self);
}

/// Runs `kernel` on registers that hold zero, whose rows have `widths` bytes. Only where [`is_used`].
pub(crate) fn dispatch<K: Kernel>(widths: [usize; REGISTERS], kernel: K) {
    #[cfg(test)]
    if !is_available() {
        #[allow(clippy::needless_return, reason = "more follows where there may be registers")]
        return kernel.run(&mut tests::Emulated::new(widths));
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the machine has them; only tests get here where it does not, and were sent elsewhere.
    let mut registers = unsafe { Amx::new(widths) };
    #[cfg(target_arch = "x86_64")]
    kernel.run(&mut registers)
}

/// Whether kernels are to use the registers.
pub(crate) fn is_used() -> bool {
    #[cfg(test)]
    if let Some(forced) = tests::forced() {
        return forced;
    }
    is_available()
}

/// Whether the machine has the registers and the system lets this process use them.
fn is_available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AVAILABLE.get_or_init(|| detect() && permit())
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Whether the processor has the registers for bytes and bf16, and the system saves them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn detect() -> bool {
    use std::arch::x86_64::{__cpuid_count, _xgetbv};

    /// The features' bits in EDX of leaf 7: bf16, tiles, bytes.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    /// The registers' configuration and content.
    const STATES: u64 = 1 << 17 | 1 << 18;

    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: the instruction reads a register that exists wherever AVX-512 was found.
        unsafe { _xgetbv(0) }
    }
    is_x86_feature_detected!("avx512vnni")
        && __cpuid_count(7, 0).edx & FEATURES == FEATURES
        // SAFETY: the system has enabled XGETBV, or AVX-512 would not have been found.
        && unsafe { saved() } & STATES == STATES
}

/// Asks for the registers on behalf of all threads of the process, those that are there already too.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn permit() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two integers and only grants a permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// The instructions' operand: which shape each register has.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    widths: [u16; 16],
    rows: [u8; 16],
}

/// The machine's registers, for as long as this lives.
#[cfg(target_arch = "x86_64")]
struct Amx {
    widths: [usize; REGISTERS],
}

#[cfg(target_arch = "x86_64")]
impl Amx {
    /// # Safety
    ///
    /// The registers are there and permitted.
    unsafe fn new(widths: [usize; REGISTERS]) -> Self {
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], widths: [0; 16], rows: [0; 16] };
        for (i, width) in widths.into_iter().enumerate() {
            (shapes.widths[i], shapes.rows[i]) = (width as u16, ROWS as u8);
        }
        // SAFETY: the operand has the instruction's layout.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly)) }
        Self { widths }
    }

    /// Elements from the first to the end of the last row.
    #[inline(always)]
    fn extent<E>(&self, tile: usize, stride: usize) -> usize {
        (ROWS - 1) * stride + self.widths[tile] / size_of::<E>()
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: the registers are there. Released, they cost nothing when the system switches threads.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

// SAFETY of every block below: whoever made the value promised the registers, and rows were found within the slice.
#[cfg(target_arch = "x86_64")]
impl Tiles for Amx {
    #[inline(always)]
    fn zero<const TILE: usize>(&mut self) {
        unsafe { asm!("tilezero tmm{}", const TILE, options(nomem, nostack, preserves_flags)) }
    }
    #[inline(always)]
    fn load<const TILE: usize, E: Copy>(&mut self, source: &[E], stride: usize) {
        assert!(self.extent::<E>(TILE, stride) <= source.len());
        unsafe {
            asm!(
                "tileloadd tmm{}, [{} + {}]",
                const TILE, in(reg) source.as_ptr(), in(reg) stride * size_of::<E>(),
                options(nostack, preserves_flags, readonly)
            )
        }
    }
    #[inline(always)]
    fn store<const TILE: usize, E: Copy>(&mut self, target: &mut [E], stride: usize) {
        assert!(self.extent::<E>(TILE, stride) <= target.len());
        unsafe {
            asm!(
                "tilestored [{} + {}], tmm{}",
                in(reg) target.as_mut_ptr(), in(reg) stride * size_of::<E>(), const TILE,
                options(nostack, preserves_flags)
            )
        }
    }
    #[inline(always)]
    fn multiply_bytes<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        unsafe {
            asm!("tdpbssd tmm{}, tmm{}, tmm{}", const SUMS, const A, const B, options(nomem, nostack, preserves_flags))
        }
    }
    #[inline(always)]
    fn multiply_bf16<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        unsafe {
            asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const SUMS, const A, const B, options(nomem, nostack, preserves_flags))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
