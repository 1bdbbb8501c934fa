"""Model families. `spec` and `registry` import no torch; a family's code is imported when it is used."""
