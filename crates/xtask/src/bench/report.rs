//! Rounds of figures, as a table and as JSON.

use serde::Serialize;

/// One figure, taken once a round.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    pub what: &'static str,
    pub unit: &'static str,
    pub rounds: Vec<f64>,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub goal: Option<Goal>,
    pub met: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

/// Rows in the order in which they first came.
#[derive(Debug, Default, Serialize)]
pub struct Table {
    pub rows: Vec<Row>,
}

impl Table {
    pub fn add(&mut self, what: &'static str, unit: &'static str, goal: Option<Goal>, value: f64) {
        let i = self.rows.iter().position(|r| r.what == what && r.unit == unit).unwrap_or_else(|| {
            self.rows.push(Row { what, unit, goal, ..Row::default() });
            self.rows.len() - 1
        });
        let row = &mut self.rows[i];
        row.rounds.push(value);
        let mut sorted = row.rounds.clone();
        row.median = percentile(&mut sorted, 0.50);
        (row.min, row.max) = (sorted[0], sorted[sorted.len() - 1]);
        row.met = row.goal.map(|g| g.met(row.median));
    }

    pub fn print(&self) {
        println!("{:44} {:>9}   {:<23} goal", "", "median", "min – max");
        for r in &self.rows {
            let goal = match (r.goal, r.met) {
                (Some(Goal::AtMost(l)), Some(met)) => format!("≤ {} {}", number(l), verdict(met)),
                (Some(Goal::AtLeast(l)), Some(met)) => format!("≥ {} {}", number(l), verdict(met)),
                _ => String::new(),
            };
            let range = format!("{} – {}", number(r.min), number(r.max));
            println!("{:44} {:>9}   {range:<23} {goal}", format!("{}, {}", r.what, r.unit), number(r.median));
        }
    }

    /// The medians, units as columns.
    pub fn print_by_unit(&self) {
        let mut names: Vec<&str> = vec![];
        let mut units: Vec<&str> = vec![];
        for r in &self.rows {
            for (list, name) in [(&mut names, r.what), (&mut units, r.unit)] {
                if !list.contains(&name) {
                    list.push(name);
                }
            }
        }
        println!("{:28}{}", "", units.iter().map(|u| format!("{u:>15}")).collect::<String>());
        for name in names {
            let cell =
                |unit: &&str| self.rows.iter().find(|r| r.what == name && r.unit == *unit).map_or(String::new(), |r| number(r.median));
            println!("{name:28}{}", units.iter().map(|u| format!("{:>15}", cell(u))).collect::<String>());
        }
    }
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

fn number(x: f64) -> String {
    match x.abs() {
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 10.0 => format!("{x:.1}"),
        a if a >= 1.0 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

/// Sorts; of an even number of values the lower of the two in the middle is the median. NaN for none.
pub fn percentile(values: &mut [f64], p: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * p).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let mut v: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&mut v, 0.50), 50.0);
        assert_eq!(percentile(&mut v, 0.99), 99.0);
        assert_eq!(percentile(&mut v, 0.0), 1.0);
        assert_eq!(percentile(&mut [7.0], 0.99), 7.0);
        assert!(percentile(&mut [], 0.5).is_nan());
    }

    #[test]
    fn rounds_of_a_row() {
        let mut t = Table::default();
        for x in [3.0, 1.0, 2.0] {
            t.add("a", "ms", Some(Goal::AtMost(2.0)), x);
            t.add("b", "/s", Some(Goal::AtLeast(2.5)), x);
        }
        assert_eq!(t.rows.len(), 2);
        let (a, b) = (&t.rows[0], &t.rows[1]);
        assert_eq!((a.median, a.min, a.max, a.met), (2.0, 1.0, 3.0, Some(true)));
        assert_eq!(b.met, Some(false));
    }
}
