//! What a machine of the lab runs for another: `limosa-lab-agent serve ADDRESS:PORT` obeys the tests
//! in the other machine, see `limosa_lab::agent`.
#![forbid(unsafe_code)]

use std::env;
use std::net::TcpListener;
use std::process::ExitCode;

use limosa_lab::agent;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address] => TcpListener::bind(address).and_then(|listener| {
            println!("listening on {address}");
            agent::serve(&listener)
        }),
        _ => {
            eprintln!("usage: limosa-lab-agent serve ADDRESS:PORT");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = result {
        eprintln!("limosa-lab-agent: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
