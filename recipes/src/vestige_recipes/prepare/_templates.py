"""Ways of asking a question with choices, and of asking for a judgement."""

QUESTIONS = (
    "{question}\nWhich of the options below is right?",
    "Read the question and choose one option.\n\n{question}",
    "Question: {question}\nGive the label of the right option.",
    "Below is a question from an exam. Answer it with the label of one option.\n\n{question}",
    "{question}\n\nOnly one of these options answers the question. Name it.",
    "Pick the best answer.\n{question}",
    "A student was asked: {question}\nWhat should the student have answered?",
    "{question}\nYour choice among the following:",
    "Here is a problem. {question}\nThe solution is one of the options.",
    "Decide which option completes or answers this.\n\n{question}",
)
"""Of a question; options and answer follow."""


JUDGEMENTS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("{text}\nIs what the narrator does here right or wrong?", ("Right", "Wrong")),
    ("Someone says: {text}\nWas that ethical?", ("Ethical", "Unethical")),
    ("{text}\n\nWould most people find this acceptable?", ("Yes", "No")),
    ("Judge the behaviour in this story.\n{text}", ("Good", "Bad")),
    ("{text}\nDoes this go against common morals?", ("No", "Yes")),
    ("Story: {text}\nThe behaviour told here is", ("Acceptable", "Unacceptable")),
    ("Read what happened, and judge it.\n\n{text}", ("Moral", "Immoral")),
    ("{text}\nShould the person feel guilty about it?", ("No", "Yes")),
    ("A friend tells you this: {text}\nDo you approve?", ("Yes", "No")),
    ("{text}\n\nIn one word, how would you call that?", ("Fine", "Wrong")),
)
"""Of a short story, with the words for label 0 (nothing is wrong) and label 1."""

CONFESSIONS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("{text}\nIs the writer the one to blame?", ("No", "Yes")),
    ("Somebody asks strangers for their judgement.\n\n{text}\nWhat do they say of the writer?", ("Innocent", "Guilty")),
    ("{text}\n\nHas the writer done wrong?", ("No", "Yes")),
    ("A post in a forum: {text}\nThe writer behaved", ("Well", "Badly")),
    ("{text}\nWould you take the writer's side?", ("Yes", "No")),
)
"""Of a post that asks whether its writer is (AITA) or would be (WIBTA) at fault."""
