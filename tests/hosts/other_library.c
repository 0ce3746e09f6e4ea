/* What host B has in the place of a library of host A: nothing in it is the same, its build id neither. */
int only_b_has_this(void);
int only_b_has_this(void) { return 42; }
