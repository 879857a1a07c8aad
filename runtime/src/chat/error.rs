//! What can be wrong with a request's messages. Every place is spelled as in the request, for example
//! `messages[3].tool_calls[0].function.name`.

use super::encode::{Effort, Profile};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    #[error("messages: the list is empty, expected at least one message\n  help: send a user message")]
    NoMessages,
    #[error(
        "{place}: missing, expected {expected}\n  help: add the field; null content is accepted only where a message may be empty"
    )]
    Missing { place: String, expected: &'static str },
    #[error("{place}: found {found}, expected {expected}\n  help: correct the type of this field")]
    WrongType { place: String, expected: &'static str, found: &'static str },
    #[error(
        "{place}: unknown role {found:?}, expected system, user, assistant, tool, developer or latest_reminder\n  help: use one of these roles"
    )]
    UnknownRole { place: String, found: String },
    #[error(
        "{place}: unknown task {found:?}, expected action, query, authority, domain, title or read_url\n  help: remove the task or use one of these"
    )]
    UnknownTask { place: String, found: String },
    #[error(
        "{place}: content part of type {found:?}, expected \"text\"\n  help: this model reads text only; remove the part"
    )]
    UnsupportedPart { place: String, found: String },
    #[error(
        "reasoning effort {effort} is not known to the {profile} release\n  help: use high or max, or leave it out"
    )]
    UnsupportedEffort { profile: Profile, effort: Effort },
}
