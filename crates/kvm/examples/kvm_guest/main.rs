//! A guest that runs in KVM, and moves while it writes to its memory: from one VM to another, first with KVM's dirty bitmap as the
//! log, then with the dirty ring. It needs `/dev/kvm`.
//!
//! ```console
//! $ cargo run -p limosa-kvm --example kvm_guest
//! ```

#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod moving;

#[cfg(target_arch = "x86_64")]
fn main() -> guest::Result<()> {
    for has_rings in [false, true] {
        println!("the log is {}", if has_rings { "a ring" } else { "a bitmap" });
        let (here, there) = (guest::Guest::new(has_rings)?, guest::Guest::new(has_rings)?);
        here.load()?;
        for guest in [&here, &there] {
            let guest = std::sync::Arc::clone(guest);
            std::thread::spawn(move || guest.run());
        }
        here.set_running(true);
        here.counts_beyond(1 << 16)?;
        let report = moving::move_guest(&here, &there)?;
        print!("{report}");
        let count = here.check()?;
        println!("it had counted to {count}, and goes on: {}", there.counts_beyond(count)?);
        there.set_running(false);
        there.check()?;
    }
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    println!("its guest is written for x86-64");
}
