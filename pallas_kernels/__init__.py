"""Array ops of hybrid-head decoding; they know no model, no config, no head map."""
