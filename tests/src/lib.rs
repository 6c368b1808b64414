//! Whole-system tests of Tidegate.

pub mod sim;
