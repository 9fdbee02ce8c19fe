"""Tools for preference datasets before anything is trained on them: check, convert, formats and survey."""
