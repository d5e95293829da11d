//! Accelerators: what they do in a second and cost in an hour.
//!
//! The table `hardware.toml` is embedded, with source and date for each entry; a user's own table of the same form is
//! read by [`Catalogue::with`] and wins over it, entry by entry.

use crate::{Error, units};
use serde::{Deserialize, Serialize};

/// One kind of accelerator.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accelerator {
    /// Short name: `h100`.
    pub name: String,
    /// Full name.
    pub title: String,
    /// Peak of 16-bit matrix products, FLOP/s.
    pub peak_flops: f64,
    /// Memory in bytes.
    pub memory_bytes: f64,
    /// Memory bandwidth in bytes/s.
    pub bandwidth: f64,
    /// Power in watts.
    pub watts: f64,
    /// Rent of one for an hour.
    pub usd_per_hour: f64,
    /// Share of the peak that training reaches.
    pub utilisation: f64,
    /// Share of the bandwidth that decoding reaches.
    pub bandwidth_share: f64,
    /// Where the numbers come from.
    pub source: String,
    /// Of what month the price is.
    pub date: String,
}

/// What an amount of arithmetic takes on an accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bill {
    /// Hours of one device.
    pub device_hours: f64,
    /// Wall-clock seconds on all devices.
    pub seconds: f64,
    /// Electrical energy in joules, the building's overhead included.
    pub joules: f64,
    /// Rent in dollars.
    pub usd: f64,
}

impl Accelerator {
    /// FLOP/s that training reaches.
    pub fn training_flops(&self) -> f64 {
        self.peak_flops * self.utilisation
    }

    /// What `flop` of training takes on `devices` of them, with `pue` joules drawn for each that the boards take.
    pub fn bill(&self, flop: f64, devices: f64, pue: f64) -> Bill {
        let device_seconds = flop / self.training_flops();
        Bill {
            device_hours: device_seconds / 3600.0,
            seconds: device_seconds / devices,
            joules: device_seconds * self.watts * pue,
            usd: device_seconds / 3600.0 * self.usd_per_hour,
        }
    }

    /// FLOP of training that `usd` rents.
    pub fn flop_for_usd(&self, usd: f64) -> f64 {
        self.flop_for_hours(usd / self.usd_per_hour)
    }

    /// FLOP of training in `hours` of one device.
    pub fn flop_for_hours(&self, hours: f64) -> f64 {
        hours * 3600.0 * self.training_flops()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    title: Option<String>,
    peak_tflops: f64,
    memory: String,
    bandwidth_gbps: f64,
    watts: f64,
    usd_per_hour: f64,
    utilisation: Option<f64>,
    bandwidth_share: Option<f64>,
    source: Option<String>,
    date: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    accelerator: Vec<Entry>,
}

/// A list of accelerators by name.
#[derive(Clone, Debug, Serialize)]
pub struct Catalogue {
    /// The entries, in the order of the tables.
    pub accelerators: Vec<Accelerator>,
}

impl Catalogue {
    /// The embedded table.
    pub fn embedded() -> Catalogue {
        let empty = Catalogue { accelerators: Vec::new() };
        empty.with(include_str!("hardware.toml")).expect("the embedded table is right (tested)")
    }

    /// These, with the entries of a table added; an entry of the same name replaces.
    ///
    /// # Errors
    /// A table that does not parse, an unknown key, values that are not positive or shares above 1, with the entry.
    pub fn with(mut self, table: &str) -> Result<Catalogue, Error> {
        let table: Table = toml::from_str(table).map_err(|e| Error::Hardware {
            place: String::new(),
            why: e.to_string().trim_end().to_string(),
        })?;
        for entry in table.accelerator {
            let new = entry.checked()?;
            match self.accelerators.iter_mut().find(|a| a.name.eq_ignore_ascii_case(&new.name)) {
                Some(old) => *old = new,
                None => self.accelerators.push(new),
            }
        }
        Ok(self)
    }

    /// The one called `name`.
    pub fn get(&self, name: &str) -> Result<&Accelerator, Error> {
        self.accelerators.iter().find(|a| a.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
            crate::error::unknown("hardware", name, self.accelerators.iter().map(|a| a.name.as_str()))
        })
    }
}

impl Entry {
    fn checked(self) -> Result<Accelerator, Error> {
        let place = format!(" entry {}", self.name);
        let wrong = |why: String| Error::Hardware { place: place.clone(), why };
        let positive = |what: &str, x: f64| {
            if x.is_finite() && x > 0.0 {
                Ok(x)
            } else {
                Err(wrong(format!("{what} is {x}; it must be positive")))
            }
        };
        let share = |what: &str, x: f64| {
            if x <= 1.0 {
                positive(what, x)
            } else {
                Err(wrong(format!("{what} is {x}; a share is at most 1")))
            }
        };
        Ok(Accelerator {
            title: self.title.unwrap_or_else(|| self.name.clone()),
            peak_flops: positive("peak_tflops", self.peak_tflops)? * 1e12,
            memory_bytes: units::bytes("memory", &self.memory).map_err(|e| wrong(e.to_string()))?,
            bandwidth: positive("bandwidth_gbps", self.bandwidth_gbps)? * 1e9,
            watts: positive("watts", self.watts)?,
            usd_per_hour: positive("usd_per_hour", self.usd_per_hour)?,
            utilisation: share("utilisation", self.utilisation.unwrap_or(0.35))?,
            bandwidth_share: share("bandwidth_share", self.bandwidth_share.unwrap_or(0.7))?,
            source: self.source.unwrap_or_else(|| "own table".into()),
            date: self.date.unwrap_or_default(),
            name: self.name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_table_wins_and_adds() {
        let own = "[[accelerator]]\nname = 'H100'\npeak_tflops = 900\nmemory = '94GB'\nbandwidth_gbps = 3000\n\
                   watts = 500\nusd_per_hour = 1\n[[accelerator]]\nname = 'mine'\npeak_tflops = 1\n\
                   memory = '8GB'\nbandwidth_gbps = 20\nwatts = 65\nusd_per_hour = 0.02\n";
        let all = Catalogue::embedded().with(own).unwrap();
        assert_eq!(all.get("h100").unwrap().memory_bytes, 94e9);
        assert_eq!(all.get("mine").unwrap().utilisation, 0.35);
        assert_eq!(all.accelerators.len(), Catalogue::embedded().accelerators.len() + 1);
    }

    #[test]
    fn wrong_tables_and_names_are_explained() {
        let check = |table: &str, part: &str| {
            let message = Catalogue::embedded().with(table).unwrap_err().to_string();
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        };
        let entry = |extra: &str| {
            format!("[[accelerator]]\nname = 'x'\npeak_tflops = 1\nbandwidth_gbps = 1\nwatts = 1\n{extra}")
        };
        check("[[accelerator", "hardware table:");
        check(&entry("memory = '1GB'\nusd_per_hour = -1"), "entry x: usd_per_hour is -1");
        check(&entry("memory = '1XB'\nusd_per_hour = 1"), "unknown unit `XB`");
        check(&entry("memory = '1GB'\nusd_per_hour = 1\nutilisation = 40"), "a share is at most 1");
        check(&entry("memory = '1GB'\nusd_per_hour = 1\npower = 3"), "unknown field `power`");
        let message = Catalogue::embedded().get("h10").unwrap_err().to_string();
        assert!(message.contains("did you mean `h100`?"), "{message}");
    }

    #[test]
    fn every_entry_is_sourced_and_dated() {
        for a in Catalogue::embedded().accelerators {
            assert!(a.source.len() > 10 && a.date.len() == 7, "{}", a.name);
        }
    }
}
