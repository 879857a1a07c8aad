//! Stop strings: where an answer's text ends.
//!
//! The string that is complete first ends the text, of several the longest, so that it does not matter how the text
//! comes in parts. What may be the beginning of one is held back, and nothing else is.

/// Looks for stop strings in a text that comes in parts.
#[derive(Debug)]
pub(super) struct Stops {
    stops: Vec<String>,
    /// The longest end of the text that begins a stop string.
    held: String,
}

impl Stops {
    /// `stops`: none of them empty.
    pub fn new(stops: Vec<String>) -> Stops {
        Stops { stops, held: String::new() }
    }

    /// Takes the text's next part. Returns what can be shown, and the stop string that ends the text after it.
    pub fn push(&mut self, part: &str) -> (String, Option<&str>) {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(part);
        let ends = self.stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at, stop)));
        if let Some((_, at, stop)) = ends.min() {
            text.truncate(at);
            return (text, Some(stop));
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let begins = |at: &usize| text.get(*at..).is_some_and(|end| self.stops.iter().any(|s| s.starts_with(end)));
        let first = text.len().saturating_sub(longest);
        let safe = (first..text.len()).find(begins).unwrap_or(text.len());
        self.held = text.split_off(safe);
        (text, None)
    }

    /// What was held back, now that nothing more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of `text` in all, and whether a stop string ended it.
    fn run(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let mut matcher = Stops::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut shown = String::new();
        for part in parts {
            let (text, ended) = matcher.push(part);
            shown += &text;
            if ended.is_some() {
                return (shown, true);
            }
        }
        (shown + &matcher.finish(), false)
    }

    #[test]
    fn every_cut_gives_the_same_end() {
        for (stops, text, shown, ended) in [
            (&["END"][..], "some ENDless text", "some ", true),
            (&["END"], "EN EEND", "EN E", true),
            (&["END"], "no en EN", "no en EN", false),
            (&["aab"], "aaaab", "aa", true),
            (&["\n\n", "\n"], "a\n\nb", "a", true),
            (&["abc", "b"], "xabc", "xa", true),
            (&["abcd", "bc"], "xabcd", "xa", true),
            (&["é?", "¿"], "caf\u{e9}\u{e9}?", "caf\u{e9}", true),
            (&["ÿ"], "þþ", "þþ", false),
            (&[], "anything", "anything", false),
        ] {
            let characters: Vec<String> = text.chars().map(String::from).collect();
            // Every way to cut the text into parts, by the bits of a number.
            for cuts in 0..1u32 << (characters.len() - 1) {
                let mut parts = vec![String::new()];
                for (i, c) in characters.iter().enumerate() {
                    if i > 0 && cuts & (1 << (i - 1)) != 0 {
                        parts.push(String::new());
                    }
                    if let Some(last) = parts.last_mut() {
                        last.push_str(c);
                    }
                }
                let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                assert_eq!(run(stops, &parts), (shown.to_owned(), ended), "{stops:?} {parts:?}");
            }
        }
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let mut matcher = Stops::new(vec!["\n\nQ:".to_owned()]);
        assert_eq!(matcher.push("answer\n"), ("answer".to_owned(), None));
        assert_eq!(matcher.push("\n"), (String::new(), None));
        assert_eq!(matcher.push("\n"), ("\n".to_owned(), None));
        assert_eq!(matcher.push("Q"), (String::new(), None));
        assert_eq!(matcher.push("A"), ("\n\nQA".to_owned(), None));
    }

    #[test]
    fn the_string_that_ends_the_text_is_told() {
        let mut matcher = Stops::new(vec!["bc".to_owned(), "abc".to_owned(), "cd".to_owned()]);
        assert_eq!(matcher.push("xab"), ("x".to_owned(), None));
        assert_eq!(matcher.push("cd"), (String::new(), Some("abc")));
    }
}
