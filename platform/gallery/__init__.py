"""Statistics and galleries of datasets, as figures S1 to S4 of the paper's supplement show them."""
