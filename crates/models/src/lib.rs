//! Seam.
