//! What templates expect of Python: `tojson`, numbers as `str` writes them, `raise_exception`, `strftime_now`.
//!
//! Follows <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/chat_template_utils.py>,
//! `_cached_compile_jinja_template`, and CPython's `json.dumps` and `float.__repr__`.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

/// Adds all of it to an environment.
pub(super) fn register(env: &mut Environment) {
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, state, value| match as_float(value) {
        Some(float) => Ok(out.write_str(&float_repr(float))?),
        None => minijinja::escape_formatter(out, state, value),
    });
    env.add_filter("string", |value: &Value| match as_float(value) {
        Some(float) => Value::from(float_repr(float)),
        None => value.as_str().map_or_else(|| Value::from(value.to_string()), |_| value.clone()),
    });
    env.add_filter("tojson", tojson);
    // In Jinja whatever has a length and is indexed is a sequence, mappings and slices of lists included.
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable)
    });
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message.to_string())))
    });
    env.add_function("strftime_now", |format: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        strftime(format, now as i64)
    });
}

/// What a template gave to `raise_exception`: the source of the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(String);

fn as_float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// `repr(float)`: the shortest digits that read back, with an exponent outside of 1e-4 to 1e16.
fn float_repr(float: f64) -> String {
    // Debug has Python's thresholds and digits, and only writes the exponent and the special values differently.
    let digits = format!("{float:?}");
    match digits.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{mantissa}e{sign}{exponent:0>2}")
        }
        None => digits.to_lowercase(),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: expected two separators")),
    };
    let style = JsonStyle {
        item,
        key,
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
}

struct JsonStyle<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// Deeper than any JSON that was parsed; a template could nest lists until the stack ends.
const MAX_JSON_DEPTH: usize = 200;

impl JsonStyle<'_> {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            _ if depth > MAX_JSON_DEPTH => Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply")),
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    let name = key.as_str().map_or_else(|| self.scalar(&key), |key| Ok(key.to_string()))?;
                    pairs.push((name, item));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.write_items(out, ['{', '}'], depth, pairs, |out, (key, item)| {
                    out.push_str(&self.string(&key));
                    out.push_str(self.key);
                    self.write(out, &item, depth + 1)
                })
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect();
                self.write_items(out, ['[', ']'], depth, items, |out, item: Value| self.write(out, &item, depth + 1))
            }
            _ => {
                out.push_str(&self.scalar(value)?);
                Ok(())
            }
        }
    }

    fn write_items<T>(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        depth: usize,
        items: Vec<T>,
        mut write: impl FnMut(&mut String, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |out: &mut String, depth| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        let is_empty = items.is_empty();
        out.push(open);
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                out.push_str(self.item);
            }
            new_line(out, depth + 1);
            write(out, item)?;
        }
        if !is_empty {
            new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn scalar(&self, value: &Value) -> Result<String, Error> {
        Ok(match (value.kind(), as_float(value)) {
            (ValueKind::None, _) => "null".into(),
            (ValueKind::Bool, _) => value.is_true().to_string(),
            (ValueKind::Number, None) => value.to_string(),
            (ValueKind::Number, Some(float)) if float.is_nan() => "NaN".into(),
            (ValueKind::Number, Some(float)) if float.is_infinite() => {
                if float > 0.0 { "Infinity" } else { "-Infinity" }.into()
            }
            (ValueKind::Number, Some(float)) => float_repr(float),
            (ValueKind::String, _) => self.string(value.as_str().unwrap_or_default()),
            (kind, _) => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} has no JSON form")));
            }
        })
    }

    fn string(&self, text: &str) -> String {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return quoted;
        }
        let mut ascii = String::new();
        for c in quoted.chars() {
            match c {
                ' '..='~' => ascii.push(c),
                _ => ascii.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}"))),
            }
        }
        ascii
    }
}

/// `time.strftime` in UTC and the C locale for the directives that prompts use; others stay as they are written.
fn strftime(format: &str, unix_seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    let (days, seconds) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil_from_days(days);
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // `%-d` is `%d` without its leading zero.
        let mut directive = chars.next();
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let number = |value: i64| if bare { value.to_string() } else { format!("{value:02}") };
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year.rem_euclid(100)),
            Some('m') => number(month),
            Some('d') => number(day),
            Some('H') => number(hour),
            Some('I') => number((hour + 11) % 12 + 1),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('B') => month_name.to_string(),
            Some('b') => month_name[..3].to_string(),
            Some('A') => weekday.to_string(),
            Some('a') => weekday[..3].to_string(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_string(),
            other => "%".chars().chain(bare.then_some('-')).chain(other).collect(),
        };
    }
    out
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
///
/// Source: <https://howardhinnant.github.io/date_algorithms.html#civil_from_days>
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    // Counted from March, so that the leap day ends the year; an era is 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Python's `datetime.fromtimestamp(seconds, timezone.utc).strftime(format)` writes them.
    #[test]
    fn dates() {
        let full = "%Y-%m-%d %H:%M:%S %A %a %B %b %y %I %p %-d %F %T %%";
        let cases = [
            (0, "1970-01-01 00:00:00 Thursday Thu January Jan 70 12 AM 1 1970-01-01 00:00:00 %"),
            (951_782_400 + 86_399, "2000-02-29 23:59:59 Tuesday Tue February Feb 00 11 PM 29 2000-02-29 23:59:59 %"),
            (4_107_542_400, "2100-03-01 00:00:00 Monday Mon March Mar 00 12 AM 1 2100-03-01 00:00:00 %"),
            (1_767_182_400, "2025-12-31 12:00:00 Wednesday Wed December Dec 25 12 PM 31 2025-12-31 12:00:00 %"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime(full, seconds), expected);
        }
        assert_eq!(strftime("%Q %-Q 100%", 0), "%Q %-Q 100%");
    }
}
