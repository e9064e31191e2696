"""The error for mistakes that a user can correct."""


class UserError(ValueError):
  """A user's request cannot be carried out. The message is one line with the wrong value and a way out.

  `launch.py` prints the message and exits with code 2. Any other exception is a defect of the program and keeps its
  traceback.
  """


class Unreadable(UserError):
  """The storage or the memory of this process has failed for too long; the other processes of the run know nothing."""
