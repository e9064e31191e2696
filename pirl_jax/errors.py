"""The one kind of error that a user can mend."""


class UserError(ValueError):
  """Something a user asked for cannot be done; the message is one line with the value seen and the way out.

  `launch.py` prints it and exits with 2. Any other exception is a defect and keeps its traceback.
  """
