//! The counter of `counter.rs`, in a server that a new process can replace under its clients. `replaceable SOCKET TAKEOVER` serves
//! it, and `replaceable SOCKET TAKEOVER take`, the same program or a newer one, takes its place.
use std::path::Path;
use std::time::Duration;

use limosa_device::{Machine, Whole};
use limosa_switch_over::{GiveOptions, OldServer, TakeOptions, TakeOver, take};
use limosa_vfio_user::server::{NewDevice, Options, Replacing, Server, SwitchOver};

#[expect(dead_code, reason = "it has a main function of its own")]
#[path = "counter.rs"]
mod counter;

const NAME: &str = "counter";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [socket, takeover, how @ ..] = &arguments[..] else {
        return Err("expected SOCKET TAKEOVER [take]".into());
    };
    let takeover = Path::new(takeover);
    let machine = Machine::simple(Whole::new(counter::Counter::default()));
    // A connection can then be handed over while its thread waits for the next request.
    let options = Options { interruptible: true, ..Options::default() };
    let (servers, old) = if how.is_empty() {
        (vec![Server::bind(socket, machine, options)?], None)
    } else {
        let device = NewDevice { machine, options, socket: Some(socket.into()), control: None };
        let options = TakeOptions { name: NAME, ..TakeOptions::default() };
        // After an error the old process keeps serving, and this one has no device.
        let taken = take(OldServer::Path(takeover), Replacing::new([device]), &options)?;
        (taken.server, Some(taken.old))
    };
    std::thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| server.serve());
        }
        // The old process listens at the same path until it ends. One that does not end is killed.
        if let Some(old) = old {
            old.see_off(Duration::from_secs(10))?;
        }
        let door = TakeOver::listen(takeover)?;
        println!("process {} serves", std::process::id());
        let (giver, options) =
            (SwitchOver::new(&servers), GiveOptions { name: NAME, ..GiveOptions::default() });
        while let Err(error) = door.serve_one(&giver, &options, None) {
            eprintln!("not replaced, this process keeps serving: {error}");
            // The same failure may come again at once, for example on a system without free descriptors.
            std::thread::sleep(Duration::from_millis(100));
        }
        // Another process serves the clients now, and waits for this one to end.
        servers.iter().for_each(|server| server.shutdown_handle().shut_down());
        Ok(())
    })
}
