//! Taper.
