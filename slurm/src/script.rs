//! Words of scripts: how they are quoted for a shell and for `#SBATCH` lines.

/// A word as a shell reads it back.
pub(crate) fn shell_word(word: &str) -> String {
    if is_plain(word) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// A word as `sbatch` reads it back from a script's comment.
pub(crate) fn sbatch_word(word: &str) -> String {
    if is_plain(word) {
        word.to_owned()
    } else {
        format!("\"{}\"", word.replace('\\', r"\\").replace('"', "\\\""))
    }
}

fn is_plain(word: &str) -> bool {
    !word.is_empty()
        && word
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c))
}

/// A batch script: options, then one command that takes the shell's place.
pub(crate) fn batch(options: &[String], free: &[String], command: &[String]) -> String {
    let mut out =
        String::from("#!/bin/bash\n# Written by baton; plan.yaml says which rank is where.\n");
    for option in options {
        out.push_str(&format!("#SBATCH {}\n", sbatch_word(option)));
    }
    for line in grouped(free) {
        let words: Vec<String> = line.iter().map(|word| sbatch_word(word)).collect();
        out.push_str(&format!("#SBATCH {}\n", words.join(" ")));
    }
    let words: Vec<String> = command.iter().map(|word| shell_word(word)).collect();
    out.push_str(&format!("\nexec {}\n", words.join(" \\\n    ")));
    out
}

/// Options with their values: a word without a dash belongs to the one in front of it.
fn grouped(words: &[String]) -> Vec<Vec<&String>> {
    let mut lines: Vec<Vec<&String>> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if !word.starts_with('-') => line.push(word),
            _ => lines.push(vec![word]),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        assert_eq!(shell_word("--a=b,c"), "--a=b,c");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
        assert_eq!(
            sbatch_word("--comment=a \"b\" \\"),
            r#""--comment=a \"b\" \\""#
        );
        assert_eq!(sbatch_word("#x"), "\"#x\"");
    }

    #[test]
    fn values_stand_behind_their_options() {
        let words = ["-C", "a b", "--x", "--y=1"].map(str::to_owned);
        let text = batch(&[], &words, &["run".to_owned(), "a".to_owned()]);
        assert!(text.contains("#SBATCH -C \"a b\"\n#SBATCH --x\n#SBATCH --y=1\n"));
        assert!(text.ends_with("\nexec run \\\n    a\n"));
    }

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        let words = ["it's", "a b", "$HOME", "`x`", "\\", "\"", "*", ";&|", "é"];
        let line: Vec<String> = words.iter().map(|word| shell_word(word)).collect();
        let output = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("printf '%s\\n' {}", line.join(" ")))
            .output()
            .expect("sh runs");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        assert_eq!(text.lines().collect::<Vec<_>>(), words);
    }
}
