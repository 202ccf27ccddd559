//! Links that are cut anywhere.

use super::*;

/// The guest after a link was cut: the side that runs it.
struct Cut {
    folder: Folder,
    source: Server,
    destination: Server,
}

/// Bytes of COMMIT, and of DONE.
const WORD: u64 = 64;

impl Cut {
    fn new() -> Cut {
        let folder = Folder::new();
        let source = folder.device("source", &["state=2M", "precopy=50"]);
        let destination = folder.device("destination", &["state=2M", "precopy=50"]);
        Cut { folder, source, destination }
    }

    /// One move over a link that is cut. Gives the bytes that passed each way, and the sender's code.
    fn with(&self, plan: Plan) -> ((u64, u64), i32) {
        for device in [&self.source, &self.destination] {
            let client = device.client();
            limosa_client::Device::reset(&client).unwrap();
        }
        self.source.mark(GUEST);
        let listen = format!("unix:{}", self.folder.text("link"));
        let receiver = start(&["receive", &self.destination.socket, "--listen", &listen]);
        receiver.line("listening on");
        let proxy = Proxy::new(&self.folder, &listen, plan);
        // With it, no two moves have the same bytes at the same place.
        let sender = start(&["send", &self.source.socket, "--to", &proxy.address, "--no-precopy"]);
        let sent = sender.end();
        // Before its offer was complete it was nobody's move, and another sender may come. At the commit the receiver may have
        // to answer and stays; the sender has ended and will not ask any more.
        if receiver.says_one_of(&["passed over", "the source may be in doubt"]).is_some() {
            receiver.signal(Signal::INT);
        }
        let received = receiver.end();
        let (source, destination) = (&self.source, &self.destination);
        let said = format!("{plan:?}: {sent:?} {received:?}");
        match (sent.code, received.code) {
            (0, 0) => {
                assert!(destination.runs(GUEST) && source.state() == State::Stop, "{said}");
            }
            // Only where the answer to COMMIT is what was lost.
            (5, 0) => {
                assert!(destination.runs(GUEST) && source.state() == State::StopCopy, "{said}");
            }
            (4, 4 | 7) => {
                assert!(source.runs(GUEST), "{said}");
                assert!(destination.state() == State::Running && destination.guest() == 0, "{said}");
                assert!(sent.err.contains("as it was before"), "{said}");
            }
            _ => panic!("{said}"),
        }
        (proxy.counts(), sent.code)
    }
}

#[test]
fn a_link_that_is_cut_anywhere_leaves_one_that_runs() {
    let cut = Cut::new();
    let ((all, _), code) = cut.with(Plan::Pass);
    assert_eq!(code, 0);
    assert!(all > 2 << 20, "{all}");
    // DONE, with its proof, comes after COMMIT, when both know that the move is over.
    let out = all - WORD;
    assert_eq!(cut.with(Plan::Cut(all - 1)).1, 0);
    for at in [
        1,
        39,
        40,
        50,
        72,
        200,
        400,
        5000,
        600_000,
        1_500_000,
        out - WORD - 33,
        out - WORD,
        out - 33,
        out - 32,
        out - 1,
    ] {
        let (_, code) = cut.with(Plan::Cut(at));
        assert_eq!(code, 4, "after {at} of {out} bytes");
    }
}

#[test]
fn a_link_that_is_cut_on_the_way_back_leaves_one_that_runs() {
    let cut = Cut::new();
    let ((_, back), code) = cut.with(Plan::Pass);
    assert_eq!(code, 0);
    for at in (1..back).step_by(13).chain([back - 1]) {
        cut.with(Plan::CutBack(at));
    }
    assert_eq!(cut.with(Plan::CutBack(back)).1, 0);
}
