//! A giver and a taker whose parts a test chooses.
#![allow(dead_code, reason = "each test uses some of it")]

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use limosa_switch_over::{Commit, Committed, Giver, Item, Refusal, Taker, Withdrawn};

/// What a side did, in order.
#[derive(Debug, Default)]
pub struct Calls(Mutex<Vec<&'static str>>);

impl Calls {
    pub fn add(&self, call: &'static str) {
        self.0.lock().unwrap().push(call);
    }

    pub fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

type Part = Box<dyn Fn() -> Result<Vec<Item>, Refusal> + Send + Sync>;

/// Gives what the test says.
pub struct TestGiver {
    pub calls: Calls,
    pub offer: Part,
    pub prepare: Part,
    pub more: Box<dyn Fn() -> Result<Option<Vec<Item>>, Refusal> + Send + Sync>,
    pub freeze: Box<dyn Fn(Instant) -> Result<(), Refusal> + Send + Sync>,
    pub rest: Part,
    pub serves: AtomicBool,
}

impl Default for TestGiver {
    fn default() -> TestGiver {
        TestGiver {
            calls: Calls::default(),
            offer: Box::new(|| Ok(Vec::new())),
            prepare: Box::new(|| Ok(Vec::new())),
            more: Box::new(|| Ok(None)),
            freeze: Box::new(|_| Ok(())),
            rest: Box::new(|| Ok(Vec::new())),
            serves: AtomicBool::new(true),
        }
    }
}

impl Giver for TestGiver {
    fn offer(&self) -> Result<Vec<Item>, Refusal> {
        self.calls.add("offer");
        (self.offer)()
    }

    fn prepare(&self) -> Result<Vec<Item>, Refusal> {
        self.calls.add("prepare");
        (self.prepare)()
    }

    fn prepare_more(&self) -> Result<Option<Vec<Item>>, Refusal> {
        let more = (self.more)()?;
        if more.is_some() {
            self.calls.add("more");
        }
        Ok(more)
    }

    fn freeze(&self, until: Instant) -> Result<(), Refusal> {
        self.calls.add("freeze");
        self.serves.store(false, SeqCst);
        (self.freeze)(until)
    }

    fn rest(&self) -> Result<Vec<Item>, Refusal> {
        self.calls.add("rest");
        (self.rest)()
    }

    fn thaw(&self) {
        self.calls.add("thaw");
        self.serves.store(true, SeqCst);
    }

    fn given(&self) {
        self.calls.add("given");
    }
}

type Take = Box<dyn FnMut(Vec<Item>) -> Result<(), Refusal> + Send>;

/// Takes as the test says.
pub struct TestTaker {
    pub check: Take,
    pub prepare: Take,
    pub load: Take,
    pub before_commit: Box<dyn FnOnce() + Send>,
}

impl Default for TestTaker {
    fn default() -> TestTaker {
        TestTaker {
            check: Box::new(|_| Ok(())),
            prepare: Box::new(|_| Ok(())),
            load: Box::new(|_| Ok(())),
            before_commit: Box::new(|| {}),
        }
    }
}

impl Taker for TestTaker {
    type Server = ();

    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal> {
        (self.check)(offer)
    }

    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        (self.prepare)(items)
    }

    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        (self.load)(items)
    }

    fn run(self, commit: Commit<'_>) -> Result<(Committed, ()), Withdrawn> {
        (self.before_commit)();
        Ok((commit.commit()?, ()))
    }
}
