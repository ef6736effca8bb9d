//! Mistakes that tests must notice: planted in kernels, which are compiled anew, and in launches.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::Result;

use super::{Origin, SESSION, Sanitizer, Session, Source, Wrong, build, is_available, is_thorough};

/// In `FOR_FLOATS`.
const HALF_FLOATS: &str = " KERNEL(\"f16\", half) KERNEL(\"bf16\", bfloat)";

/// Asserts that `test` fails for each of `mutants`, an exchange of one text in `source` for another: for all of them in
/// thorough runs, else for every fourth, because each has to be compiled. They are compiled without kernels for half
/// floats, which `test` must not need. Schedules take turns; a mutant that survives that meets all of them in thorough
/// runs.
pub(crate) fn assert_mutants_fail(source: &'static Source, mutants: &[(&str, &str)], test: impl Fn() -> Result<()>) {
    if !is_available() {
        return;
    }
    for (from, _) in mutants {
        assert_eq!(source.text.matches(from).count(), 1, "{}: {from:?} must be there once", source.name);
    }
    let survives = |(from, to): &&(&str, &str)| {
        let text = source.text.replace(from, to).replace(HALF_FLOATS, "");
        build(source.name, &text, Sanitizer::Address, Origin::Planted)
            .unwrap_or_else(|error| panic!("{from:?} -> {to:?}: {error}"));
        let is_noticed = |in_all_schedules| {
            let mutant = Some((source.name, text.clone()));
            Session { mutant, in_all_schedules, ..Default::default() }.fails(&test)
        };
        !(is_noticed(false) || is_thorough() && is_noticed(true))
    };
    let planted = mutants.iter().step_by(if is_thorough() { 1 } else { 4 });
    let survivors: Vec<_> = planted.filter(survives).collect();
    assert!(survivors.is_empty(), "{}: not noticed: {survivors:#?}", source.name);
}

/// Asserts that `test` fails when the launches of one of its kernels are wrong in any way that applies to one of them: a
/// threadgroup is missing, an offset is forgotten, two arguments of a kind are exchanged. The first two must apply
/// somewhere.
pub(crate) fn assert_wrong_launches_fail(test: impl Fn() -> Result<()>) {
    assert_wrong_launches_fail_but(&[], test);
}

/// The same, but for exchanges of two arguments of a function that change nothing.
pub(crate) fn assert_wrong_launches_fail_but(harmless: &[(&str, usize, usize)], test: impl Fn() -> Result<()>) {
    if !is_available() {
        return;
    }
    SESSION.set(Some(Session::default()));
    test().expect("passes as it is");
    let wrongs = SESSION.take().expect("set above").applicable;
    assert!(wrongs.iter().any(|(_, wrong)| matches!(wrong, Wrong::Fewer(_))), "no launch of several threadgroups");
    assert!(wrongs.iter().any(|(_, wrong)| matches!(wrong, Wrong::FromStart(_))), "no argument at an offset");
    let survives = |wrong: &(String, Wrong)| !Session { wrong: Some(wrong.clone()), ..Default::default() }.fails(&test);
    let survivors: Vec<_> = wrongs.into_iter().filter(survives).collect();
    let harmless = harmless.iter().map(|&(kernel, i, j)| (kernel.to_string(), Wrong::Exchanged(i, j)));
    assert_eq!(survivors, harmless.collect::<Vec<_>>(), "not noticed, and harmless");
}

/// Runs `f` on the CPU's own kernels within a test that [`emulated`] runs: what results are compared with.
pub(crate) fn suspended<T>(f: impl FnOnce() -> T) -> T {
    let session = SESSION.take();
    let result = f();
    SESSION.set(session);
    result
}

impl Session {
    /// Whether the test does.
    fn fails(self, test: impl Fn() -> Result<()>) -> bool {
        SESSION.set(Some(self));
        let result = catch_unwind(AssertUnwindSafe(test));
        SESSION.set(None);
        !matches!(result, Ok(Ok(())))
    }
}
