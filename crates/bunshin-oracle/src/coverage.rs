//! Which encodings ran, how often, and which that the host knows did not.
use crate::case::Case;
use crate::compare::{Outcome, Stop};
use crate::generate::pool::Pool;
use crate::generate::Choice;
use iced_x86::{Code, Decoder, DecoderOptions};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Counts by encoding.
pub struct Coverage(Vec<u64>);

impl Default for Coverage {
    fn default() -> Self {
        Self(vec![0; Code::values().len()])
    }
}

impl Coverage {
    /// Count the instructions of a case up to where it stopped; what branches
    /// passed over counts too.
    pub fn add(&mut self, case: &Case, outcome: &Outcome) {
        let end = if outcome.stop == Stop::Breakpoint { u64::MAX } else { outcome.state.rip };
        let mut rip = case.state.rip;
        for bytes in case.code.iter() {
            if rip > end {
                break;
            }
            let code = Decoder::new(case.bits(), bytes, DecoderOptions::AMD).decode().code();
            self.0[code as usize] += 1;
            rip += bytes.len() as u64;
        }
    }

    /// How often an encoding ran.
    pub fn count(&self, code: Code) -> u64 {
        self.0[code as usize]
    }

    /// Encodings that would be drawn under `choice` and did not run.
    pub fn gaps(&self, choice: &Choice) -> Vec<Code> {
        let drawn = Pool::survey(choice).into_iter().filter(|(_, reason)| reason.is_none());
        drawn.map(|(code, _)| code).filter(|code| self.count(*code) == 0).collect()
    }

    /// A line an encoding, then what was left out and why, then the gaps.
    pub fn report(&self, choice: &Choice) -> String {
        let survey = Pool::survey(choice);
        let mut text = String::new();
        let mut reasons: BTreeMap<&str, Vec<Code>> = BTreeMap::new();
        for (code, reason) in &survey {
            let count = self.count(*code);
            if count > 0 {
                let _ = writeln!(text, "{count:10} {code:?}");
            } else if let Some(reason) = reason {
                reasons.entry(reason).or_default().push(*code);
            }
        }
        let ran = survey.iter().filter(|(code, _)| self.count(*code) > 0).count();
        let gaps = self.gaps(choice);
        let _ = writeln!(text, "{ran} of the {} encodings that the host knows ran", survey.len());
        for (reason, codes) in reasons {
            let names: Vec<_> = codes.iter().map(|c| format!("{c:?}")).collect();
            let _ = writeln!(text, "{} not drawn: {reason}: {}", codes.len(), names.join(" "));
        }
        let names: Vec<_> = gaps.iter().map(|c| format!("{c:?}")).collect();
        let _ = writeln!(text, "{} drawn that never ran: {}", gaps.len(), names.join(" "));
        text
    }
}
