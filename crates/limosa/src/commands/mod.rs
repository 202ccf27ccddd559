//! One module for each command.

pub mod answer;
pub mod bench;
pub mod check;
mod check_fuzz;
pub mod demo;
pub mod doctor;
pub mod doubts;
pub mod fsm;
pub mod generate;
pub mod inspect;
pub mod list;
pub mod man;
pub mod moving;
pub mod next;
pub mod probe;
pub mod region;
pub mod serve;
pub mod settle;
pub mod state;
pub mod switch_over;
pub mod trace;
pub mod verify;
