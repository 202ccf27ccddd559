//! What holds for offers and answers.

use proptest::prelude::*;

use super::*;
use crate::PciIds;

fn offer() -> Offer {
    Offer {
        devices: vec![DeviceFacts {
            name: "net0".into(),
            flags: 7,
            pci: Some(PciIds::default()),
            ..Default::default()
        }],
        memory: vec![MemoryFacts { id: 0, address: 0x1000, bytes: 0x4000, page_bytes: 0x1000 }],
        ..Offer::default()
    }
}

#[test]
fn offers_round_trip_and_ignore_what_they_do_not_know() {
    assert_eq!(Offer::decode(&offer().encode().unwrap()), Ok(offer()));
    let newer = br#"{"devices":[{"id":3,"name":"x","flags":1,"colour":"red"}],"weather":[1]}"#;
    assert_eq!(Offer::decode(newer).unwrap().devices[0].id, 3);
    let needs = br#"{"devices":[],"needs":["postcopy"]}"#;
    assert_eq!(Offer::decode(needs), Err(Damage::Unknown { what: "postcopy".into() }));
}

#[test]
fn offers_beyond_the_limits_are_refused() {
    let refused = |change: &dyn Fn(&mut Offer)| {
        let mut offer = offer();
        change(&mut offer);
        let json = serde_json::to_vec(&offer).unwrap();
        assert!(Offer::decode(&json).is_err(), "{offer:?}");
        assert!(offer.encode().is_err());
    };
    refused(&|o| o.devices = vec![o.devices[0].clone(); 2]);
    refused(&|o| o.devices[0].name = "n".repeat(NAME_BYTES_MAX + 1));
    refused(&|o| o.devices[0].regions = Some(vec![0; REGIONS_MAX + 1]));
    refused(&|o| o.needs.push(NEEDS_PROOFS.into()));
    refused(&|o| o.memory.push(o.memory[0]));
    refused(&|o| o.memory.push(MemoryFacts { id: 1, address: 0x4000, ..o.memory[0] }));
    refused(&|o| o.memory.push(MemoryFacts { id: 1, address: 0, ..o.memory[0] }));
    refused(&|o| {
        let of = |id| MemoryFacts { id, address: u64::from(id) << 20, ..o.memory[0] };
        o.memory = (0..257).map(of).collect();
    });
    refused(&|o| o.memory[0].bytes = MEMORY_BYTES_MAX + 0x1000);
    refused(&|o| o.memory[0].bytes = 0);
    refused(&|o| o.memory[0].bytes = 0x1001);
    refused(&|o| o.memory[0].address = 0x800);
    refused(&|o| o.memory[0].address = u64::MAX - 0xfff);
    refused(&|o| o.memory[0].page_bytes = 3);
    refused(&|o| o.memory[0].page_bytes = 2 << 20);
    refused(&|o| {
        o.devices = (0..65).map(|id| DeviceFacts { id, ..o.devices[0].clone() }).collect();
    });
}

#[test]
fn a_secret_and_a_challenge_survive_the_handshake_and_are_not_shown() {
    let secret = Secret::random().unwrap();
    let offer = Offer { secret: Some(secret.clone()), needs: vec![NEEDS_PROOFS.into()], ..offer() };
    let payload = offer.encode().unwrap();
    assert_eq!(Offer::decode(&payload).unwrap().secret, Some(secret));
    assert!(format!("{offer:?}").contains("Secret(..)"));
    let answer = Answer { challenge: Some(Nonce::random().unwrap()), ..Answer::default() };
    assert_eq!(Answer::decode(&answer.encode().unwrap()).unwrap().challenge, answer.challenge);
    for wrong in [r#""00""#, "7", r#"["00"]"#, &format!("\"{}\"", "g".repeat(64))] {
        assert!(
            Offer::decode(format!(r#"{{"devices":[],"secret":{wrong}}}"#).as_bytes()).is_err(),
            "{wrong}"
        );
        let answer = format!(r#"{{"accepted":true,"challenge":{wrong}}}"#);
        assert!(Answer::decode(answer.as_bytes()).is_err(), "{wrong}");
    }
}

#[test]
fn a_device_that_stood_still_is_said_to_and_others_are_as_older_readers_know_them() {
    let (running, mut stopped) = (offer(), offer());
    stopped.devices[0].stopped = true;
    let json = |offer: &Offer| String::from_utf8(offer.encode().unwrap()).unwrap();
    assert!(json(&stopped).contains(r#""stopped":true"#) && !json(&running).contains("stopped"));
    assert_eq!(Offer::decode(json(&stopped).as_bytes()), Ok(stopped));
    assert!(!Offer::decode(json(&running).as_bytes()).unwrap().devices[0].stopped);
}

#[test]
fn memory_may_touch_and_have_holes() {
    let mut offer = offer();
    for (id, address) in [(1, 0x5000), (2, 0x10_0000), (3, u64::MAX - 0x3fff)] {
        offer.memory.push(MemoryFacts { id, address, ..offer.memory[0] });
    }
    assert_eq!(Offer::decode(&offer.encode().unwrap()), Ok(offer));
}

#[test]
fn a_refusal_has_reasons_and_not_endlessly_many() {
    let why = Answer::decode(br#"{"accepted":false}"#).unwrap().reasons;
    assert_eq!(why, ["the destination refuses and does not say why"]);
    let many = Answer { accepted: false, reasons: vec!["no".into(); 10_000], ..Answer::default() };
    assert_eq!(Answer::decode(&many.encode().unwrap()).unwrap().reasons.len(), ANSWER_REASONS_MAX);
}

#[test]
fn an_answer_with_too_many_reasons_keeps_some() {
    let answer = Answer { accepted: false, reasons: vec!["x".repeat(10_000); 100], ..Answer::default() };
    let kept = Answer::decode(&answer.encode().unwrap()).unwrap();
    assert!(!kept.accepted && !kept.reasons.is_empty() && kept.reasons.len() < 100);
}

proptest! {
    #[test]
    fn arbitrary_json_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,100}") {
        let _ = Offer::decode(&bytes);
        let _ = Answer::decode(&bytes);
        let _ = Offer::decode(text.as_bytes());
    }
}

#[test]
fn deep_json_is_refused() {
    let deep = format!("{{\"x\":{}", "[".repeat(100_000));
    assert!(Offer::decode(deep.as_bytes()).is_err());
}
