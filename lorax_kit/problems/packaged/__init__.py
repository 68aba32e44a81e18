"""Problems on data sets and models that install as packages."""
