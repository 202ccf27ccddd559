//! Servers that refuse, break at or misanswer DEVICE_FEATURE.

use super::*;

#[test]
fn a_server_that_refuses_device_feature_is_used_without() {
    let (client, thread) = with(Options { features: true, ..options() }, |peer| {
        peer.answer_version("{}");
        for _ in 0..FEATURE_PROBES {
            let (header, _) = peer.receive();
            peer.send(header.refusal(Errno::EINVAL), &[]);
        }
        peer.region(3);
    });
    let client = client.unwrap();
    assert!(client.migration_flags().unwrap().is_empty());
    assert_eq!(client.mig_data_size().unwrap(), None);
    assert!(!client.precopy_info_v2().unwrap());
    assert_eq!(client.reset_count().unwrap(), None, "and nothing is sent: the next request is the read");
    assert_eq!(read(&client).unwrap(), 3);
    thread.join().unwrap();
}

#[test]
fn a_server_whose_only_extension_is_not_the_reset_count_is_not_asked_for_it() {
    // As a server that keeps its step and refuses indexes that it does not know, by whatever errno.
    for errno in [Errno::ENOTTY, Errno::EINVAL, Errno::ENOTSUP, Errno::EIO] {
        let (client, thread) = with(Options { features: true, ..options() }, move |peer| {
            peer.answer_version("{}");
            for _ in 0..FEATURE_PROBES {
                let (header, body) = peer.receive();
                let asked = body.get(4..6).map(|index| [index[0], index[1]]);
                match asked {
                    Some([0x02, 0xfe]) => peer.send(header.refusal(errno), &[]),
                    _ => peer.reply(&header, &[&body[..], &[0; 16]].concat()),
                }
            }
            peer.region(4);
        });
        let client = client.unwrap();
        assert_eq!(client.reset_count().unwrap(), None, "{errno}");
        assert!(!client.probe(FeatureIndex::RESET_COUNT, FeatureOp::GET).unwrap());
        assert_eq!(read(&client).unwrap(), 4);
        thread.join().unwrap();
    }
}

#[test]
fn a_reset_count_that_is_cut_or_refused_leaves_the_connection_in_step() {
    let (client, thread) = with_features(|peer| {
        for bytes in [0, 7, 8] {
            let (header, body) = peer.receive();
            assert_eq!(body, [16u32, 1 << 16 | 0xfe02].map(u32::to_ne_bytes).concat(), "the header alone");
            peer.reply(&header, &[&body[..], &[1; 8][..bytes]].concat());
        }
        for errno in [Errno::ENOTTY, Errno::EINVAL, Errno::EIO] {
            let (header, _) = peer.receive();
            peer.send(header.refusal(errno), &[]);
        }
        peer.region(5);
    });
    for _ in 0..2 {
        assert!(matches!(client.reset_count(), Err(Error::Misbehaved { .. })), "it said that it has it");
    }
    assert_eq!(client.reset_count().unwrap(), Some(0x0101_0101_0101_0101));
    assert_eq!(client.reset_count().unwrap(), None);
    assert_eq!(client.reset_count().unwrap(), None);
    assert!(client.reset_count().unwrap_err().is_refused(Errno::EIO), "no answer either way");
    assert_eq!(read(&client).unwrap(), 5);
    thread.join().unwrap();
}

#[test]
fn a_server_that_loses_its_step_and_finds_it_is_used_without_features() {
    let (client, thread) = with(Options { features: true, ..options() }, |peer| {
        peer.answer_version("{}");
        // Takes the body of what it does not know for a header.
        let mut header = [0; 16];
        for _ in 0..2 {
            peer.0.read_exact(&mut header).unwrap();
            let header = Header::read_from_bytes(&header).unwrap();
            peer.send(Header { error: 0, ..header.refusal(Errno::EINVAL) }, &[]);
        }
        let (info, body) = peer.receive();
        assert_eq!(info.command, Command::DEVICE_GET_INFO);
        peer.reply(&info, &body);
        peer.region(4);
    });
    let client = client.unwrap();
    assert!(client.migration_flags().unwrap().is_empty());
    assert!(client.state().unwrap_err().is_refused(Errno::ENOTTY));
    assert_eq!(read(&client).unwrap(), 4);
    thread.join().unwrap();
}

#[test]
fn a_server_that_breaks_on_device_feature_is_connected_to_again() {
    type Script = fn(Peer);
    let ways: [(&str, Script); 3] = [
        ("closes", |mut peer| drop(peer.receive())),
        ("sends garbage", |mut peer| {
            drop(peer.receive());
            peer.0.write_all(&[0xff; 64]).unwrap();
            std::io::copy(&mut peer.0, &mut std::io::sink()).unwrap();
        }),
        ("answers out of order", |mut peer| {
            let _first = peer.receive();
            let (second, body) = peer.receive();
            peer.reply(&second, &body);
            std::io::copy(&mut peer.0, &mut std::io::sink()).unwrap();
        }),
    ];
    for (name, way) in ways {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let mut first = Peer(listener.accept().unwrap().0);
            first.answer_version("{}");
            way(first);
            let mut second = Peer(listener.accept().unwrap().0);
            second.answer_version("{}");
            second.region(8);
        });
        let client = Client::connect(&path, Options { features: true, ..options() }).unwrap();
        assert!(client.migration_flags().unwrap().is_empty(), "{name}: nothing is asked again");
        assert_eq!(read(&client).unwrap(), 8);
        thread.join().unwrap();
    }
}

#[test]
fn a_probe_is_sent_as_promised() {
    let (client, thread) = with(Options { features: true, ..options() }, |peer| {
        peer.answer_version("{}");
        let (header, body) = peer.receive();
        assert_eq!((header.command, header.size), (Command::DEVICE_FEATURE, 32));
        let as_header = Header::read_from_bytes(&body).unwrap();
        assert_eq!((as_header.command, as_header.flags), (Command(0), 0));
        assert_eq!(body[4..8], (FeatureOp::PROBE.bits() | FeatureOp::GET.bits() | 1).to_ne_bytes());
    });
    assert!(client.is_err());
    thread.join().unwrap();
}
