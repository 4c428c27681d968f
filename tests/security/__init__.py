"""What somebody who sends files can do: nothing."""
