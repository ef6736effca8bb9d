//! MSL to C++: what clang cannot take from a preprocessed `.metal` is rewritten, and its kernels are registered with
//! the emulator's runtime.
//!
//! The subset: kernels with an attribute on every parameter, templates instantiated by
//! `template [[host_name("..")]] [[kernel]] decltype(f<T>) f<T>;`, boolean function constants, threadgroup variables
//! declared one a statement, vector constructors `float4(..)` and `vec<T, 4>(..)`.

use std::fmt::Write;

/// Translates a preprocessed source; an error names what is outside the subset.
pub fn translate(preprocessed: &str) -> Result<String, String> {
    let mut translation = Translation { tokens: lex(preprocessed), ..Default::default() };
    translation.run()?;
    Ok(translation.finish())
}

#[derive(Clone, Debug)]
struct Token<'a> {
    text: &'a str,
    /// Whether space comes before it: operators are taken character by character.
    is_spaced: bool,
    file: &'a str,
    line: usize,
}

fn lex(source: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let (mut file, mut line) = ("", 1);
    for text in source.lines() {
        // A marker: # line "file" flags
        if let Some(marker) = text.strip_prefix("# ") {
            line = marker.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(line);
            file = marker.split('"').nth(1).unwrap_or(file);
            continue;
        }
        let mut rest = text;
        while !rest.trim_start().is_empty() {
            let is_spaced = rest.starts_with(char::is_whitespace) || rest.len() == text.len();
            rest = rest.trim_start();
            let len = token_len(rest);
            tokens.push(Token { text: &rest[..len], is_spaced, file, line });
            rest = &rest[len..];
        }
        line += 1;
    }
    tokens
}

fn token_len(text: &str) -> usize {
    let first = text.as_bytes()[0];
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    match first {
        b'"' => text[1..].find('"').map_or(text.len(), |end| end + 2),
        b'0'..=b'9' => number_len(text),
        b'.' if text[1..].starts_with(|c: char| c.is_ascii_digit()) => number_len(text),
        _ if is_word(first.into()) => text.find(|c| !is_word(c)).unwrap_or(text.len()),
        _ => 1,
    }
}

fn number_len(text: &str) -> usize {
    let mut before = ' ';
    let is_part = |c: char, before: char| {
        c.is_ascii_alphanumeric() || c == '.' || (matches!(c, '+' | '-') && matches!(before, 'e' | 'E' | 'p'))
    };
    for (at, c) in text.char_indices() {
        if !is_part(c, before) {
            return at;
        }
        before = c;
    }
    text.len()
}

#[derive(Default)]
struct Translation<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    out: String,
    place: (&'a str, usize),
    /// Name and parameters of each kernel.
    kernels: Vec<(&'a str, Vec<Parameter<'a>>)>,
    /// Name on the host and instance of each instantiated template.
    instances: Vec<(String, String)>,
    /// Index and name of each function constant.
    constants: Vec<(&'a str, &'a str)>,
}

struct Parameter<'a> {
    attribute: &'static str,
    index: &'a str,
    is_optional: bool,
}

impl<'a> Translation<'a> {
    fn run(&mut self) -> Result<(), String> {
        while self.at < self.tokens.len() {
            if self.starts(&["template", "[", "[", "host_name"]) {
                self.instance()?;
            } else if self.starts(&["[", "[", "kernel", "]", "]"]) {
                self.at += 5;
                self.kernel()?;
            } else if self.starts(&["kernel", "void"]) {
                self.at += 1;
                self.kernel()?;
            } else if self.starts(&["constant", "bool"]) && self.text(3) == "[" {
                self.constant()?;
            } else if self.is_threadgroup_variable() {
                self.threadgroup_variable()?;
            } else if is_vector(self.text(0)) && self.text(1) == "(" {
                let vector = self.next();
                self.write(&format!("emulator::make<{vector}>"));
            } else if self.starts(&["vec", "<"]) {
                self.vector_template()?;
            } else {
                self.copy()?;
            }
        }
        Ok(())
    }

    /// `template [[host_name("a" "b")]] [[kernel]] decltype(f<T>) f<T>;`
    fn instance(&mut self) -> Result<(), String> {
        self.at += 4;
        self.expect("(")?;
        let mut name = String::new();
        while self.text(0) != ")" {
            name += self.next().trim_matches('"');
        }
        while self.text(0) != "decltype" {
            self.next_or("decltype")?;
        }
        self.at += 1;
        let end = self.closing(self.at, "(", ")")?;
        let instance = self.join(self.at + 1, end);
        self.instances.push((name, instance));
        while self.next_or(";")? != ";" {}
        Ok(())
    }

    fn kernel(&mut self) -> Result<(), String> {
        self.expect("void")?;
        let name = self.next_or("a name")?;
        self.write(&format!("void {name}"));
        let end = self.closing(self.at, "(", ")")?;
        self.expect("(")?;
        self.write("(");
        let mut parameters = Vec::new();
        while self.at < end {
            while !self.starts(&["[", "["]) {
                if self.at >= end {
                    return Err(format!("kernel {name}: a parameter without an attribute"));
                }
                self.copy()?;
            }
            parameters.push(self.parameter(name)?);
            if self.at < end {
                self.expect(",")?;
                self.write(",");
            }
        }
        self.kernels.push((name, parameters));
        Ok(())
    }

    /// `[[buffer(1), function_constant(X)]]` and the like.
    fn parameter(&mut self, kernel: &str) -> Result<Parameter<'a>, String> {
        self.at += 2;
        let word = self.next();
        let Some((_, attribute)) = ATTRIBUTES.iter().find(|(name, _)| *name == word) else {
            return Err(format!("kernel {kernel}: attribute {word} of a parameter is not known"));
        };
        let index = if self.text(0) == "(" { self.text(1) } else { "0" };
        let mut is_optional = false;
        while !self.starts(&["]", "]"]) {
            is_optional |= self.next_or("]]")? == "function_constant";
        }
        self.at += 2;
        Ok(Parameter { attribute, index, is_optional })
    }

    /// `constant bool X [[function_constant(0)]];`
    fn constant(&mut self) -> Result<(), String> {
        let (name, index) = (self.text(2), self.text(7));
        self.at += 3;
        for token in ["[", "[", "function_constant", "(", index, ")", "]", "]"] {
            self.expect(token)?;
        }
        self.constants.push((index, name));
        self.write(&format!("static bool {name}"));
        Ok(())
    }

    /// Whether a statement `threadgroup T name..;` starts here that declares no pointer.
    fn is_threadgroup_variable(&self) -> bool {
        let is_statement = self.at == 0 || matches!(self.tokens[self.at - 1].text, "{" | "}" | ";");
        let statement = self.tokens[self.at..].iter().map(|token| token.text).take_while(|text| *text != ";");
        let mut declarator = statement.take_while(|text| !matches!(*text, "=" | "["));
        is_statement && self.text(0) == "threadgroup" && declarator.all(|text| text != "*")
    }

    fn threadgroup_variable(&mut self) -> Result<(), String> {
        self.write("static");
        let mut name = "";
        let mut is_named = false;
        loop {
            match self.copy()? {
                ";" => break,
                "[" => is_named = true,
                word if !is_named && word.starts_with(|c: char| c.is_ascii_alphabetic()) => name = word,
                _ => {}
            }
        }
        self.write(&format!("EMULATOR_POISON({name});"));
        Ok(())
    }

    /// `vec<T, 4>(x)` is a constructor, `vec<T, 4> x` is not.
    fn vector_template(&mut self) -> Result<(), String> {
        let end = self.closing(self.at + 1, "<", ">")?;
        let vector = self.join(self.at, end + 1);
        self.at = end + 1;
        let is_constructor = self.text(0) == "(";
        self.write(&if is_constructor { format!("emulator::make<{vector}>") } else { vector });
        Ok(())
    }

    fn finish(mut self) -> String {
        let registered = |name: &str| {
            let is_of = |instance: &str| instance.split(['<', ' ']).next() == Some(name);
            self.instances.iter().any(|(_, instance)| is_of(instance))
        };
        let plain: Vec<(String, String)> = self
            .kernels
            .iter()
            .filter(|(name, _)| !registered(name))
            .map(|(name, _)| (name.to_string(), name.to_string()))
            .collect();
        self.out += "\n#line 1 \"registration\"\n";
        for (name, parameters) in &self.kernels {
            let parameters: Vec<String> = parameters
                .iter()
                .map(|Parameter { attribute, index, is_optional }| {
                    format!("{{emulator::Attribute::{attribute}, {index}, {is_optional}}}")
                })
                .collect();
            let _ = writeln!(
                self.out,
                "static const emulator::Parameter {name}_parameters[] = {{{}}};",
                parameters.join(", ")
            );
        }
        self.out += "__attribute__((constructor)) static void emulator_register() {\n";
        for (name, instance) in plain.iter().chain(&self.instances) {
            let kernel = instance.split(['<', ' ']).next().unwrap_or(instance);
            let _ = writeln!(self.out, "  emulator::register_kernel(\"{name}\", {instance}, {kernel}_parameters);");
        }
        for (index, name) in &self.constants {
            let _ = writeln!(self.out, "  emulator::add_constant({index}, &{name});");
        }
        self.out + "}\n"
    }

    fn text(&self, ahead: usize) -> &'a str {
        self.tokens.get(self.at + ahead).map_or("", |token| token.text)
    }

    fn starts(&self, texts: &[&str]) -> bool {
        texts.iter().enumerate().all(|(ahead, text)| self.text(ahead) == *text)
    }

    fn next(&mut self) -> &'a str {
        self.at += 1;
        self.tokens[self.at - 1].text
    }

    fn next_or(&mut self, wanted: &str) -> Result<&'a str, String> {
        if self.at < self.tokens.len() { Ok(self.next()) } else { Err(format!("the source ends before {wanted}")) }
    }

    fn expect(&mut self, text: &str) -> Result<(), String> {
        let got = self.next_or(text)?;
        let Token { file, line, .. } = self.tokens[self.at - 1];
        if got == text { Ok(()) } else { Err(format!("{file}:{line}: {got}, expected {text}")) }
    }

    /// Index of the token that closes the bracket at index `open`.
    fn closing(&self, open: usize, opening: &str, closing: &str) -> Result<usize, String> {
        let mut depth = 0;
        for (at, token) in self.tokens.iter().enumerate().skip(open) {
            depth += usize::from(token.text == opening);
            if token.text == closing {
                depth -= 1;
                if depth == 0 {
                    return Ok(at);
                }
            }
        }
        Err(format!("{opening} is not closed"))
    }

    fn join(&self, start: usize, end: usize) -> String {
        self.tokens[start..end].iter().map(|token| token.text).collect::<Vec<_>>().join(" ")
    }

    /// Takes a token over as it is.
    fn copy(&mut self) -> Result<&'a str, String> {
        let text = self.next_or(";")?;
        let is_spaced = self.tokens[self.at - 1].is_spaced;
        self.append(text, is_spaced);
        Ok(text)
    }

    fn write(&mut self, text: &str) {
        self.append(text, true);
    }

    /// Appends `text` as written where the last token taken stands, so that clang names lines of the source.
    fn append(&mut self, text: &str, is_spaced: bool) {
        let Token { file, line, .. } = self.tokens[self.at.saturating_sub(1).min(self.tokens.len() - 1)];
        if self.place != (file, line) {
            let _ = write!(self.out, "\n#line {line} \"{file}\"\n");
            self.place = (file, line);
        }
        if is_spaced {
            self.out.push(' ');
        }
        self.out += text;
    }
}

const ATTRIBUTES: [(&str, &str); 10] = [
    ("buffer", "BUFFER"),
    ("thread_position_in_grid", "POSITION_IN_GRID"),
    ("threadgroup_position_in_grid", "THREADGROUP"),
    ("thread_position_in_threadgroup", "POSITION"),
    ("threadgroups_per_grid", "THREADGROUPS"),
    ("threads_per_threadgroup", "THREADS"),
    ("thread_index_in_threadgroup", "INDEX"),
    ("thread_index_in_simdgroup", "LANE"),
    ("simdgroup_index_in_threadgroup", "SIMDGROUP"),
    ("simdgroups_per_threadgroup", "SIMDGROUPS"),
];

fn is_vector(word: &str) -> bool {
    let scalars = ["float", "half", "bfloat", "char", "uchar", "uint", "ushort", "ulong"];
    let scalar = word.strip_suffix(['2', '3', '4']);
    scalar.is_some_and(|scalar| scalars.contains(&scalar))
}
