/* What /proc/self/smaps says about one mapping. */
#ifndef SMAPS_H
#define SMAPS_H
#include "subject.h"

/* The VmFlags line of the mapping that begins at `start`, without the flags that say who watches it (userfaultfd) or what
 * the kernel makes of it; and the line that names it. False: there is no such mapping. */
__attribute__((unused)) static bool mapping_flags(const void *start, char *flags, size_t size, char *heading, size_t heading_size) {
    char *text = slurp("/proc/self/smaps", NULL), begin[32];
    snprintf(begin, sizeof begin, "%lx-", (unsigned long)(uintptr_t)start);
    bool found = false;
    for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (!strncmp(line, begin, strlen(begin))) {
            found = true;
            if (heading) snprintf(heading, heading_size, "%s", line);
        } else if (found && !strncmp(line, "VmFlags:", 8)) {
            flags[0] = 0;
            for (char *inner, *flag = strtok_r(line + 8, " ", &inner); flag; flag = strtok_r(NULL, " ", &inner))
                if (strcmp(flag, "um") && strcmp(flag, "uw") && strcmp(flag, "ac") && strcmp(flag, "sd") &&
                    strlen(flags) + 4 < size)
                    strcat(strcat(flags, flag), " ");
            free(text);
            return true;
        }
    }
    free(text);
    return false;
}
#endif
