//! As much of Rust as the rules need: code without text, words, functions.

/// A word of code, or a single other character, and its line.
pub type Token = (usize, String);

/// The text with comments, strings and characters blanked out, line by line as before.
pub fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = skip(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// The end of the comment, string or character that starts at `at`; `at` if none does.
fn skip(chars: &[char], at: usize) -> usize {
    let is = |offset: usize, text: &str| {
        text.chars().enumerate().all(|(i, c)| chars.get(at + offset + i) == Some(&c))
    };
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    if is(0, "//") {
        return (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len());
    }
    if is(0, "/*") {
        return block_comment_end(chars, at);
    }
    if !in_word {
        for prefix in ["r", "br", "cr"] {
            let hashes = chars[at..].iter().skip(prefix.len()).take_while(|&&c| c == '#').count();
            if is(0, prefix) && is(prefix.len() + hashes, "\"") {
                return raw_end(chars, at + prefix.len() + hashes + 1, hashes);
            }
        }
    }
    if is(0, "\"") {
        return quoted_end(chars, at + 1, '"');
    }
    // A character, not a lifetime.
    if is(0, "'") && (is(1, "\\") || chars.get(at + 2) == Some(&'\'')) {
        return quoted_end(chars, at + 1, '\'');
    }
    at
}

fn quoted_end(chars: &[char], mut at: usize, quote: char) -> usize {
    while at < chars.len() && chars[at] != quote {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

fn raw_end(chars: &[char], from: usize, hashes: usize) -> usize {
    let ends = |i: usize| {
        chars[i] == '"' && chars[i + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    };
    (from..chars.len()).find(|&i| ends(i)).map_or(chars.len(), |i| i + 1 + hashes)
}

fn block_comment_end(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Words of code (names, keywords, numbers) and single other characters, with the number of their line.
pub fn tokens(code: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    let mut word = false;
    let mut line = 1;
    for c in code.chars() {
        let in_word = c.is_alphanumeric() || c == '_';
        if in_word && word {
            tokens.last_mut().unwrap().1.push(c);
        } else if !c.is_whitespace() {
            tokens.push((line, c.to_string()));
        }
        word = in_word;
        line += usize::from(c == '\n');
    }
    tokens
}

/// The end (exclusive) of the bracketed part that starts at token `open`.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, (_, token)) in tokens.iter().enumerate().skip(open) {
        match token.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Functions with a body: name, line, number of lines.
pub fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    for i in 0..tokens.len().saturating_sub(1) {
        let is_name = tokens[i + 1].1.starts_with(|c: char| c.is_alphabetic() || c == '_');
        if tokens[i].1 != "fn" || !is_name {
            continue;
        }
        let mut at = i + 2;
        while at < tokens.len() && !matches!(tokens[at].1.as_str(), "{" | ";") {
            at = if matches!(tokens[at].1.as_str(), "(" | "[") { closing(&tokens, at) } else { at + 1 };
        }
        if at < tokens.len() && tokens[at].1 == "{" {
            let end = tokens[closing(&tokens, at) - 1].0;
            found.push((tokens[i + 1].1.clone(), tokens[i].0, end + 1 - tokens[i].0));
        }
    }
    found
}

/// The code without items for tests only (`#[cfg(test)]`), and the names of modules in files of which that is true.
pub fn without_tests(code: &str) -> (Vec<Token>, Vec<String>) {
    let tokens = tokens(code);
    let marker = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut kept, mut modules) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let marked = tokens[at..].iter().zip(marker).filter(|(t, m)| t.1 == *m).count() == marker.len();
        if !marked {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        at += marker.len();
        let from = at;
        while at < tokens.len() && !matches!(tokens[at].1.as_str(), "{" | ";") {
            at += 1;
        }
        let names: Vec<&str> = tokens[from..at].iter().map(|t| t.1.as_str()).collect();
        match (tokens.get(at).map(|t| t.1.as_str()), names.as_slice()) {
            (Some("{"), _) => at = closing(&tokens, at),
            (_, [.., "mod", name]) => modules.push((*name).to_owned()),
            _ => {}
        }
        at += usize::from(tokens.get(at).is_some_and(|t| t.1 == ";"));
    }
    (kept, modules)
}

#[test]
fn code_is_told_from_text() {
    let text = "a('\"', \"b // \\\" c\", r#\"d \" e\"#) // f\n/* g /* h */ i */ j<'k>('l', b'\\'', 'm)";
    let words: Vec<String> = tokens(&code_of(text)).into_iter().map(|t| t.1).collect();
    let names: Vec<&str> =
        words.iter().map(String::as_str).filter(|w| w.chars().all(char::is_alphanumeric)).collect();
    assert_eq!(names, ["a", "j", "k", "b", "m"]);
    assert_eq!(code_of(text).lines().count(), text.lines().count());
}

#[test]
fn functions_are_measured() {
    let code =
        "fn a(x: [u8; 3]) -> u8 {\n  { 1 }\n}\ntrait T { fn b();\n fn c() {\n\n\n} }\nlet f: fn(u8) = g;";
    assert_eq!(functions(code), [("a".to_owned(), 1, 3), ("c".to_owned(), 5, 4)]);
}
