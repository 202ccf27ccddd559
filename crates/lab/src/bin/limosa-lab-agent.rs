//! What a machine of the lab runs for the tests of another.
#![forbid(unsafe_code)]

use std::env;
use std::error::Error;
use std::net::TcpListener;
use std::process::ExitCode;

use limosa_client::Device;
use limosa_lab::agent;
use limosa_vfio_kernel::{KernelDevice, Options};

const USAGE: &str = "\
usage: limosa-lab-agent serve ADDRESS:PORT                  obey whoever connects
       limosa-lab-agent poke DEVICE REGION OFFSET BYTE...   write bytes to a register, one by one
       limosa-lab-agent peek DEVICE REGION OFFSET COUNT     read so many bytes from it, one by one";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["serve", address] => serve(address),
        ["poke", device, region, offset, ref bytes @ ..] => poke(device, region, offset, bytes),
        ["peek", device, region, offset, count] => peek(device, region, offset, count),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = result {
        eprintln!("limosa-lab-agent: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn serve(address: &str) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(address)?;
    // The lab starts the tests when it reads this.
    println!("listening on {address}");
    Ok(agent::serve(&listener)?)
}

fn poke(device: &str, region: &str, offset: &str, bytes: &[&str]) -> Result<(), Box<dyn Error>> {
    let device = KernelDevice::open(device, &Options::default())?;
    let (region, offset) = (region.parse()?, offset.parse()?);
    for byte in bytes {
        device.region_write(region, offset, &[byte.parse()?])?;
    }
    Ok(())
}

fn peek(device: &str, region: &str, offset: &str, count: &str) -> Result<(), Box<dyn Error>> {
    let device = KernelDevice::open(device, &Options::default())?;
    let (region, offset, count) = (region.parse()?, offset.parse()?, count.parse::<usize>()?);
    let mut bytes = Vec::new();
    for _ in 0..count {
        let mut byte = [0];
        device.region_read(region, offset, &mut byte)?;
        bytes.push(byte[0].to_string());
    }
    println!("{}", bytes.join(" "));
    Ok(())
}
