"""Tables of bad data, one for each way in; `hostile_inputs` puts them together."""
