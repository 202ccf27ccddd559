//! Offers and questions while a move is under way, and a process that only answers.

use super::*;

/// A device that counts how often it is called, and a destination of it.
fn counted(called: &Arc<AtomicUsize>) -> Hooked {
    let called = called.clone();
    Hooked::new("there", FLAGS, &[]).on(move |_, _| {
        called.fetch_add(1, Ordering::SeqCst);
    })
}

#[test]
fn a_second_offer_reset_the_devices_of_a_guest_that_had_just_arrived() {
    let (options, ledger, called) = (options(), Arc::new(Ledger::new()), Arc::default());
    let acceptor = accepting(None, &ledger, SILENCE);
    let (source, there) = (Hooked::new("source", FLAGS, &[7; 900]), counted(&called));
    let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&there)]);
    let (address, noted) = (acceptor.address().clone(), Mutex::new(None));
    let note = AtCommit(|note: &CommitNote| *noted.lock().unwrap() = Some(note.clone()));
    let (outcome, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offered = offered(&acceptor);
            Destination::new(&there, &ledger, &options).receive_offered(offered)
        });
        let link = connect(&address, LIMIT).unwrap();
        let outcome = Source::new(&here, &options).with_vmm(&note).send(&link);
        drop(link);
        (outcome, receiving.join().unwrap())
    });
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let Received::Runs(report) = received else { panic!("{received:?}") };
    let before = called.load(Ordering::SeqCst);
    // By the same source, and by somebody who disappears.
    let again = Hooked::new("source", FLAGS, &[8; 900]);
    let outcome = Source::new(&[MovedDevice::new(&again)], &options).send(&connect(&address, LIMIT).unwrap());
    let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("a move was committed here, and this process only answers"), "{reason}");
    let mut stranger =
        says(&acceptor, &opening(preface(PrefaceFlags::empty()), &[(Kind::OFFER, &an_offer())]));
    let reason = refusal(&mut stranger);
    assert!(reason.contains("no move is taken here"), "{reason}");
    assert_eq!(called.load(Ordering::SeqCst), before, "no device was called");
    // It still answers the source, and nobody else.
    let id = report.id.parse().unwrap();
    let asks = Preface::new(id, PrefaceFlags::empty());
    let mut heard = Vec::new();
    says(&acceptor, &opening(asks, &[(Kind::QUERY, &[])])).read_to_end(&mut heard).unwrap();
    let heard = String::from_utf8_lossy(&heard);
    assert!(heard.contains("QUERY: it carries no proof"), "{heard}");
    let doubt = InDoubt::recover(noted.into_inner().unwrap().unwrap());
    let outcome = Source::new(&[], &options).resolve(doubt, &connect(&address, LIMIT).unwrap());
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let answer = acceptor.accept(wait()).unwrap();
    let Incoming::Answered { id: asked, decision: Decision::Committed } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(asked, id);
}

#[test]
fn offers_and_questions_while_a_move_is_under_way_are_answered_and_do_not_disturb_it() {
    let ledger = Arc::new(Ledger::new());
    let acceptor = accepting(None, &ledger, SILENCE);
    let offer = opening(preface(PrefaceFlags::empty()), &[(Kind::OFFER, &an_offer())]);
    let first = says(&acceptor, &offer);
    let taken = offered(&acceptor);
    let reason = refusal(&mut says(&acceptor, &offer));
    assert!(reason.contains(&NoMove::Busy.to_string()), "{reason}");
    let question = opening(preface(PrefaceFlags::empty()), &[(Kind::QUERY, &[])]);
    assert_eq!(outcome(&mut says(&acceptor, &question)), 0);
    // When it has ended, another one is taken.
    let device = Hooked::new("there", FLAGS, &[]);
    let options = options();
    drop(first);
    let there = [MovedDevice::new(&device)];
    let received = Destination::new(&there, &ledger, &options).receive_offered(taken);
    assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
    assert_eq!(device.state(), State::Running);
    assert!(matches!(acceptor.accept(wait()), Ok(Incoming::Answered { id: ID, .. })));
    let _second = says(&acceptor, &offer);
    drop(offered(&acceptor));
    // One that is only looked at leaves the place free as well.
    let _third = says(&acceptor, &offer);
    offered(&acceptor);
}

#[test]
fn a_process_that_only_answers_is_held_by_nobody_and_takes_no_move() {
    let ledger = Arc::new(Ledger::new());
    let acceptor = Acceptor::answering(bound(), None, ledger, &believing(SILENCE)).unwrap();
    let held: Vec<_> =
        (0..3).map(|_| says(&acceptor, &opening(preface(PrefaceFlags::empty()), &[]))).collect();
    let offer = opening(preface(PrefaceFlags::empty()), &[(Kind::OFFER, &an_offer())]);
    let reason = refusal(&mut says(&acceptor, &offer));
    assert!(reason.contains(&NoMove::Answers.to_string()), "{reason}");
    let question = opening(preface(PrefaceFlags::empty()), &[(Kind::QUERY, &[])]);
    assert_eq!(outcome(&mut says(&acceptor, &question)), 0);
    drop(held);
    // Over a link that somebody else has accepted, too.
    let (near, far) = SocketLink::pair().unwrap();
    let (done, answered) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || done.send(Ledger::new().answer(&far, &options(), None)).unwrap());
        let outcome = {
            let device = Hooked::new("source", FLAGS, &[7; 9]);
            Source::new(&[MovedDevice::new(&device)], &options()).send(&near)
        };
        let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert!(reason.contains(&NoMove::Answers.to_string()), "{reason}");
        let answered = answered.recv().unwrap();
        assert!(matches!(answered, Err(Error::NotTaken { why: NoMove::Answers })), "{answered:?}");
    });
}
