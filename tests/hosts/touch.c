/* Changes one byte in the memory that the steadfast subject filled with fill(…, 1): what it must notice. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* As in subject.h. */
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

int main(int count, char **values) {
    char path[64], line[512], permissions[8];
    if (count != 2) return 2;
    snprintf(path, sizeof path, "/proc/%d/maps", atoi(values[1]));
    FILE *maps = fopen(path, "r");
    snprintf(path, sizeof path, "/proc/%d/mem", atoi(values[1]));
    int fd = open(path, O_RDWR);
    unsigned long start, end;
    while (maps && fd >= 0 && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %7s", &start, &end, permissions) != 3 || strcmp(permissions, "rw-p")) continue;
        for (unsigned long at = start; at < end; at += 4096) {
            uint64_t word;
            if (pread(fd, &word, 8, (off_t)at) != 8 || word != mix(at ^ 1)) continue;
            word ^= 1 << 20;
            return pwrite(fd, &word, 8, (off_t)at) != 8;
        }
    }
    return 1;
}
