"""What the scripts share: data, episodes, encoders, and the bookkeeping around a step."""


class UserError(Exception):
    """Something the user can put right. The message is one line: found, needed, what to do."""

    def __init__(self, message):
        # A library's own words, quoted in the message, may run over several lines.
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


def first_line(error):
    """Return the first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
