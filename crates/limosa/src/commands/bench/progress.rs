//! The progress of a run: each line of the table as it is done and, on a terminal, the measure under way.

use indicatif::ProgressBar;
use limosa_bench::{Document, Event, HEAD};

use crate::output::Output;
use crate::terminal::{self, Bar};

pub struct Progress<'a> {
    out: &'a Output,
    bar: Option<Bar>,
    has_head: bool,
    printed: anyhow::Result<()>,
}

impl<'a> Progress<'a> {
    pub fn new(out: &'a Output) -> Progress<'a> {
        let bar = out.progress().then(|| {
            Bar::show(ProgressBar::no_length(), "{spinner} {pos}/{len} {elapsed_precise} {wide_msg}")
        });
        Progress { out, bar, has_head: false, printed: Ok(()) }
    }

    pub fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Begins { id, at, of } => {
                if let Some(bar) = &self.bar {
                    let bar = bar.bar();
                    bar.set_length(*of as u64);
                    bar.set_position(*at as u64);
                    bar.set_message((*id).to_owned());
                }
            }
            Event::Measured(measure) => {
                let head = if self.has_head { String::new() } else { format!("{HEAD}\n") };
                self.has_head = true;
                self.print(&format!("{head}{measure}\n"));
            }
        }
    }

    fn print(&mut self, text: &str) {
        if self.printed.is_err() {
            return;
        }
        let print = || self.out.text(|to| to.write_all(text.as_bytes()));
        self.printed = terminal::without_bar(print);
    }

    /// The lines below the table. An error if the table could not be printed.
    pub fn end(mut self, document: &Document) -> anyhow::Result<()> {
        drop(self.bar.take());
        let mut text = String::new();
        document.end(&mut text)?;
        self.print(&text);
        self.printed
    }
}
